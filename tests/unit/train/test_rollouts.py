"""What the model says becomes a split: what is kept, resumed and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import sound_at
from raytune_ft.data.prompts import Prompts, prompted
from raytune_ft.data.report import check_same
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import CheckpointError, ConfigError, DataError
from raytune_ft.layout import ROLLOUTS, prompts_file
from raytune_ft.model.load import load_tokenizer
from raytune_ft.rundir import RunSpec
from raytune_ft.train.credit import advantages_of, same_of
from raytune_ft.train.report import Silent
from raytune_ft.train.rollouts import Rollout, with_rewards
from raytune_ft.train.run import run_training
from raytune_ft.train.speaker import Answered
from tests.support.objectives import config_of, save_inputs
from tests.support.runs import BrokenRun, Recorder, losses, metrics, run

NAN = float("nan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def prepared(folder: Path, config: Config, cache: Path) -> Any:
    tokenizer = load_tokenizer(config.model)
    plain = prepare_data(config.data, tokenizer, config.seed, cache)
    return prompted(config, plain, tokenizer)


def test_prompts_stand_beside_the_examples(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "grpo", {})
    data = prepared(folder, config, tmp_path)
    for name, split in data.all_splits.items():
        prompts = Prompts(data.path / prompts_file(name))
        assert len(prompts) == len(split) > 0
        for i in range(len(prompts)):
            assert prompts[i].ids == tuple(split.example(i)[0].tolist())
            assert prompts[i].columns["prompt"] == prompts[i].text
        assert split.label_counts.sum() == 0
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    weights = {row["prompt"]: row["weight"] for row in rows}
    first = Prompts(data.path / prompts_file("train"))[0]
    assert data.train.columns["weight"][0, 0] == weights[first.text]


def test_equal_prompts_are_on_one_side(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"x{i % 6}", "answer": i} for i in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.train.path": str(path), "data.train.example_weight": None}
    data = prepared(folder, config_of(folder, "grpo", changes), tmp_path / "cache")
    sides = [
        {Prompts(data.path / prompts_file(name))[i].text for i in range(len(split))}
        for name, split in data.all_splits.items()
    ]
    assert not sides[0] & sides[1]


def test_rows_that_rewards_read_may_not_change(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "grpo", {})
    data = prepared(folder, config, tmp_path)
    saved = tmp_path / "data.json"
    saved.write_text(data.report.to_json())
    check_same(saved, data.report)
    rewarded = with_rewards(config, data).report
    saved.write_text(rewarded.to_json())
    check_same(saved, rewarded)
    other = replace(rewarded, reward_files={"vowels": "0"})
    with pytest.raises(DataError, match=r"rewards\.vowels with a file"):
        check_same(saved, other)
    other = replace(data.report, prompt_files=data.report.prompt_files | {"train": "0"})
    with pytest.raises(DataError, match="other columns"):
        check_same(saved, other)
    (data.path / prompts_file("train")).write_text("{}\n")
    assert sound_at(data.path) is None


def test_a_rollout_in_a_checkpoint(tmp_path: Path) -> None:
    split = TokenizedSplit.from_examples(
        [(np.arange(4, dtype=np.int32), np.array([False, False, True, True]))] * 2,
        {"advantage": np.array([[0.5], [-0.5]])},  # type: ignore[dict-item]
    )
    labels: Any = np.linspace(0, 1, 4)
    split = replace(split, label_columns={"sampled": labels})
    written = Rollout(5, 12, 2, split, {"reward": 0.25})
    from safetensors.torch import save_file

    save_file(written.tensors, tmp_path / "rollout.safetensors")
    read = Rollout.load(tmp_path / "rollout.safetensors")
    assert (read.step, read.first, read.each, read.figures) == (5, 12, 2, {"reward": 0.25})
    assert read.split.sha256 == split.sha256
    assert read.split.label_columns["sampled"].dtype == np.float64
    assert np.array_equal(read.split.label_columns["sampled"], labels)
    (tmp_path / "rollout.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="rollout"):
        Rollout.load(tmp_path / "rollout.safetensors")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale: str) -> None:
    totals = np.array([[1.0, 2.0, 6.0], [1.0, NAN, 3.0], [NAN, NAN, 4.0], [2.0, 2.0, 2.0]])
    found, taking = advantages_of(totals, scale)
    assert taking[:, 0].tolist() == [True, True, False, True]
    assert np.allclose(found.sum(1), 0)
    assert found[1, 1] == 0
    assert not found[2:].any()
    spread = {"group": np.std([1, 2, 6], ddof=1), "batch": np.nanstd(totals, ddof=1), "none": 1}
    scaled = (6 - 3) / (spread[scale] + (1e-4 if scale != "none" else 0))
    assert found[0, 2] == pytest.approx(scaled, rel=1e-12)
    assert same_of(totals).tolist() == [False, False, True, True]
    excluded = np.array([True, False, False, False])
    assert not advantages_of(totals, scale, excluded)[0][0].any()


def test_kept_completions_are_cut_back_on_a_resume(folder: Path, tmp_path: Path) -> None:
    changes = {"checkpoint.asynchronous": False, "train.rollout.keep": 2}
    config = config_of(folder, "grpo", changes)
    run(config, tmp_path / "whole")
    with pytest.raises(BrokenRun):
        run(config, tmp_path / "cut", reporter=Recorder(fail_at=6))  # in the second rollout
    rows = (tmp_path / "cut" / ROLLOUTS).read_text()
    (tmp_path / "cut" / ROLLOUTS).write_text(rows + '{"step": 5, "half')
    run(config, tmp_path / "cut", resumes=True)
    whole = (tmp_path / "whole" / ROLLOUTS).read_text()
    assert (tmp_path / "cut" / ROLLOUTS).read_text() == whole
    kept = [json.loads(line) for line in whole.splitlines()]
    assert [row["step"] for row in kept] == [1, 1, 5, 5, 9, 9]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_watched_reward_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """It is measured beside an objective on given data, which learns the same to the last bit."""
    rewards = [f"{folder / 'score.py'}:vowels"]
    watched = {
        "rewards": rewards,
        "train.watch": ["vowels"],
        "train.rollout": {"max_completion_length": 6},
    }
    run(config_of(folder, "sft", {}), tmp_path / "plain")
    run(config_of(folder, "sft", watched), tmp_path / "watched")
    assert losses(tmp_path / "plain") == losses(tmp_path / "watched")
    lines = [line for line in metrics(tmp_path / "watched") if "eval_loss" in line]
    assert all(line["eval_completion_tokens"] <= 6 for line in lines)
    assert all(line["eval_reward:vowels"] >= 0 for line in lines)
    assert all("eval_reward" not in line for line in lines)


def test_errors_of_rewards_are_over_prompts() -> None:
    """Completions of one prompt are not independent; prompts without a score count nothing."""
    scores = [[1.0, 3.0], [None, 5.0], [None, None], [6.0, 6.0]]
    named = [[{"some": one, "few": None} for one in group] for group in scores]
    answered = Answered([], [], named, np.zeros((4, 2)))
    expected = np.std([2.0, 5.0, 6.0], ddof=1) / np.sqrt(3)
    assert answered.errors(["some", "few"]) == {"reward_error:some": pytest.approx(expected)}


def test_a_watched_reward_of_grpo_is_not_trained_on(folder: Path, tmp_path: Path) -> None:
    run(config_of(folder, "grpo", {"train.watch": ["short"]}), tmp_path / "run")
    line = metrics(tmp_path / "run")[0]
    assert line["eval_reward"] == line["eval_reward:vowels"] != line["eval_reward:short"]
    assert line["eval_loss"] == -line["eval_reward"]
    assert line["eval_reward_error:short"] > 0


def test_a_run_that_learns_nothing_ends(folder: Path, tmp_path: Path) -> None:
    code = "def flat(completions, **rest):\n    return [1.0 for _ in completions]\n"
    (tmp_path / "own.py").write_text(code)
    changes = {"rewards": [f"{tmp_path / 'own.py'}:flat"], "train.grpo": {}}
    changes |= {"train.rollout": {"num_generations": 2, "max_completion_length": 4}}
    config = config_of(folder, "grpo", changes)
    result = run(config, tmp_path / "run")
    assert result.status == "failed"
    assert result.error is not None
    assert "two different rewards" in result.error
    assert "temperature" in result.error


def test_a_reward_that_needs_another_column(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def own(completions, solution, **columns):\n    return []\n")
    config = config_of(folder, "grpo", {"rewards": [f"{tmp_path / 'own.py'}:own"]})
    with pytest.raises(ConfigError, match=r"'solution', which is no column of data\.train"):
        with_rewards(config, prepared(folder, config, tmp_path))


def test_any_row_may_have_the_column_of_a_reward(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def own(completions, solution, **columns):\n    return []\n")
    rows = [{"prompt": f"x{i}"} | ({"solution": i} if i % 2 else {}) for i in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.train.path": str(path), "data.train.example_weight": None}
    changes |= {"rewards": [f"{tmp_path / 'own.py'}:own"]}
    config = config_of(folder, "grpo", changes)
    data = prepared(folder, config, tmp_path / "cache")
    assert "solution" not in Prompts(data.path / prompts_file("train"))[0].columns
    assert with_rewards(config, data).report.prompt_columns["train"] == ("prompt", "solution")


def test_memory_of_a_rollout_is_not_copied(folder: Path, tmp_path: Path) -> None:
    """A checkpoint between two rollouts holds none, and one inside a rollout does."""
    changes = {"checkpoint.asynchronous": False, "checkpoint.keep_last": 9}
    config = config_of(folder, "grpo", changes)
    data_dir = prepared(folder, config, tmp_path / "cache").path
    (tmp_path / "run").mkdir()
    run_training(RunSpec(config, tmp_path / "run", data_dir), "single", Silent())
    found = {
        int(path.name.removeprefix("step-")): (path / "state" / "rollout.safetensors").is_file()
        for path in (tmp_path / "run" / "checkpoints").iterdir()
    }
    assert len(found) > 1
    assert all(inside == (step % 4 > 0) for step, inside in found.items())
