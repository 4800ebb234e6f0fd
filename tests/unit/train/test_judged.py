"""Training on a judge that compares, which answers over real HTTP and prefers the longer text."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.config.schema import Config
from raytune_ft.layout import FIRST_ANSWERS, ROLLOUTS
from raytune_ft.rewards.base import Group
from raytune_ft.rewards.pool import started
from tests.support.judge import KEY, Server, serving
from tests.support.objectives import config_of, save_inputs
from tests.support.runs import BrokenRun, Recorder, metrics, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving() as found:
        yield found


def config_with(
    folder: Path, server: Server, objective: str, answers: Path, **rollout: Any
) -> Config:
    judge = {
        "name": "judge",
        "url": server.url,
        "model": "m",
        "api_key": "${JUDGE_KEY}",
        "mode": "pairs",
        "answers": str(answers),
    }
    own = {"max_completion_length": 8, "steps_per_generation": 2, "keep": 1000, **rollout}
    changes = {
        "train.rollout": own,
        "train.grpo": {},
        "train.max_examples": 7 * 4,
        "train.eval_every_examples": 7 * 2,
        "checkpoint": {"every_examples": 7, "keep_last": 4, "asynchronous": False},
        "rewards": [judge],
    }
    config = config_of(folder, objective, changes)
    return config.model_copy(update={"rewards": [type(config.rewards[0]).model_validate(judge)]})


def groups_of(run_dir: Path) -> list[list[dict[str, Any]]]:
    lines = map(json.loads, (run_dir / ROLLOUTS).read_text().splitlines())
    return [list(rows) for _, rows in groupby(lines, lambda row: (row["step"], row["prompt"]))]


def shares_of(texts: list[str]) -> list[float]:
    """How many of the others each is longer than, by hand; equally long is a disagreement."""
    found = []
    for i, one in enumerate(texts):
        others = [text for j, text in enumerate(texts) if j != i]
        found.append(
            np.mean([0.5 + 0.5 * np.sign(len(one.strip()) - len(o.strip())) for o in others])
        )
    return [float(each) for each in found]


@pytest.mark.parametrize(
    ("objective", "count"),
    [("online_dpo", 2), pytest.param("online_dpo", 3, marks=pytest.mark.slow), ("grpo", 3)],
)
def test_what_a_judge_prefers_is_trained_on(
    folder: Path, server: Server, objective: str, count: int, tmp_path: Path
) -> None:
    config = config_with(folder, server, objective, tmp_path / "asked", num_generations=count)
    run(config, tmp_path / "run")
    found = [group for group in groups_of(tmp_path / "run") if len(group) == count]
    ties = 0
    assert len(found) > 20
    for group in found:
        shares = shares_of([row["completion"] for row in group])
        assert [row["reward"] for row in group] == pytest.approx(shares)
        advantages = np.array([row["advantage"] for row in group])
        if len(set(shares)) == 1:
            ties += 1
            assert not advantages.any()
        elif objective == "online_dpo":
            assert shares[int(advantages.argmax())] == max(shares)
            assert shares[int(advantages.argmin())] == min(shares)
            assert sorted(advantages) == [-1.0, *[0.0] * (count - 2), 1.0]
        else:
            apart = np.array(shares) - np.mean(shares)
            assert advantages == pytest.approx(apart / (np.std(shares, ddof=1) + 1e-4))
    if count == 2:
        assert ties > 0
    asked = Counter(server.questions)
    assert set(asked.values()) == {1}
    # The model before training wins half against itself, without a question.
    evaluations = [line for line in metrics(tmp_path / "run") if "eval_reward" in line]
    assert evaluations[0]["eval_reward"] == evaluations[0]["eval_reward:judge"] == 0.5
    assert len(evaluations) == 3
    # The same run again asks nothing.
    run(config, tmp_path / "again")
    assert Counter(server.questions) == asked
    assert metrics(tmp_path / "again")[-1]["eval_reward"] == evaluations[-1]["eval_reward"]


def test_a_resume_asks_nothing_twice_and_compares_with_the_same_answers(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    config = config_with(folder, server, "grpo", tmp_path / "asked", num_generations=3)
    run(config, tmp_path / "whole")
    other = config_with(folder, server, "grpo", tmp_path / "asked twice", num_generations=3)
    server.questions.clear()
    with pytest.raises(BrokenRun):
        run(other, tmp_path / "run", reporter=Recorder(fail_at=3))
    run(other, tmp_path / "run", resumes=True)
    assert set(Counter(server.questions).values()) == {1}
    ours, theirs = (metrics(tmp_path / name)[-1] for name in ("run", "whole"))
    assert ours["eval_reward"] == theirs["eval_reward"]
    (tmp_path / "run" / FIRST_ANSWERS).unlink()
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").glob("step-*")))
    result = run(other, tmp_path / "run", resumes=True)
    assert result.status == "failed"
    assert f"{FIRST_ANSWERS} is missing, and rewards" in str(result.error)


def test_answers_are_compared_with_those_of_the_same_place(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    config = config_with(folder, server, "grpo", tmp_path / "asked")
    judge = config.rewards[0].model_copy(update={"api_key": KEY})
    said = [["a", "bbb"], ["cc", "first"]]
    groups = [Group(f"r:{i}", "why?", "", texts, [[1]] * 2) for i, texts in enumerate(said)]
    with started([judge]) as rewards:
        found = rewards.score_against(groups, [["bb", "bb"], ["cc", "first of two"]])
    assert [[one["judge"] for one in each] for each in found] == [[0.0, 1.0], [0.5, 0.5]]
    assert len(server.questions) == 6
