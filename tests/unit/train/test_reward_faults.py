"""Rewards that hang or die in the middle of training."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest

from raytune_ft.config.schema import Config
from tests.support.objectives import config_of, save_inputs
from tests.support.runs import metrics, run

EACH, PROMPTS, LIMIT_S = 3, 4, 2.0
HANGS = """
import time
from pathlib import Path

calls = Path(__file__).with_suffix(".calls")

def vowels(completions, **columns):
    with calls.open("a") as file:
        file.write("x")
    if calls.stat().st_size == {at}:
        time.sleep(1000)
    return [sum(letter in "aeiou" for letter in one) for one in completions]
"""
DIES = HANGS.replace("== {at}", ">= {at}").replace("time.sleep(1000)", "__import__('os')._exit(7)")
LEARNT = HANGS.replace("== {at}", ">= {at}").replace(
    "time.sleep(1000)", "return [1.0] * len(completions)"
)
GONE = LEARNT.replace("1.0", "None")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def config_for(inputs: Path, file: Path, code: str, at: int) -> Config:
    file.write_text(code.format(at=at))
    return config_of(
        inputs,
        "grpo",
        {
            "data.train.example_weight": None,
            "rewards": [{"name": f"{file}:vowels", "timeout_s": LIMIT_S}],
            "train.rollout": {"num_generations": EACH, "max_completion_length": 6},
            "train.grpo": {},
            "train.batch_size": PROMPTS,
            "train.max_examples": PROMPTS * 6,
            "train.eval_every_examples": PROMPTS * 6,
        },
    )


def test_a_reward_that_hangs_costs_its_time_limit_once(inputs: Path, tmp_path: Path) -> None:
    """The prompt that it hung on has no scores, and the run goes on with the others."""
    # The evaluation before training asks once for each of 8 prompts, each step 4 times.
    config = config_for(inputs, tmp_path / "own.py", HANGS, 8 + PROMPTS + 2)
    began = time.monotonic()
    assert run(config, tmp_path / "run").status == "completed"
    print(f"{time.monotonic() - began:.1f} s")
    steps = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line.get("unscored", 0) for line in steps] == [0, EACH, 0, 0, 0, 0]
    lines = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if json.loads(line)["step"] == 2]
    missing = [number for number, row in enumerate(rows) if row["reward"] is None]
    assert missing == list(range(EACH, 2 * EACH))
    assert all(rows[number]["rewards"] == {"vowels": None} for number in missing)
    assert all(rows[number]["advantage"] == 0 for number in missing)
    waited = max(after["wall_s"] - one["wall_s"] for one, after in pairwise(steps))
    print(f"the longest step takes {waited:.1f} s")
    assert waited >= LIMIT_S


def test_a_reward_that_dies_again_and_again_ends_the_run(inputs: Path, tmp_path: Path) -> None:
    config = config_for(inputs, tmp_path / "own.py", DIES, 8 + PROMPTS + 2)
    result = run(config, tmp_path / "run")
    assert result.status == "failed"
    assert result.error is not None
    print(result.error)
    assert "own.py:vowels died 3 times in a row (its process died: exit code 7)" in result.error
    # The prompt that it died on is named by its row and by its words.
    rows = [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]
    origin, _, prompt = result.error.rpartition("last on ")[2].partition(": ")
    number = int(origin.removeprefix("rows.jsonl:")) - 1
    assert prompt == repr(rows[number]["prompt"])
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1]


def test_a_run_that_has_learnt_everything_goes_on(inputs: Path, tmp_path: Path) -> None:
    """Equal rewards tell a run that begins with them that it will not learn, and no other."""
    config = config_for(inputs, tmp_path / "own.py", LEARNT, 8 + PROMPTS + 1)
    changes = {"max_examples": PROMPTS * 10}
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    assert run(config, tmp_path / "run").status == "completed"
    steps = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["same_rewards"] for line in steps[1:]] == [1.0] * 9
    assert all(line["grad_norm"] == 0 for line in steps[1:])


def test_a_run_that_nobody_scores_ends(inputs: Path, tmp_path: Path) -> None:
    config = config_for(inputs, tmp_path / "own.py", GONE, 8 + PROMPTS + 1)
    result = run(config, tmp_path / "run")
    assert result.status == "failed"
    assert "step 6: no completion has a score: rows.jsonl:" in str(result.error)
