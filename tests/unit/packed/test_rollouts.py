"""Packed runs that learn from what their models say are what they would be alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Config
from tests.support.models import true_float64
from tests.support.objectives import config_of
from tests.support.packed import Packed, run_packed
from tests.support.rolled import BY_OBJECTIVE, SHARED, configs_of, said, save_rolled_inputs
from tests.support.runs import BrokenRun, Recorder, largest_difference, losses, metrics, run

BOUND = 1e-9


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rolled_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    root = tmp_path_factory.mktemp("alone")
    with true_float64():
        for objective in BY_OBJECTIVE:
            for name, config in configs_of(inputs, objective).items():
                assert run(config, root / objective / name).status == "completed"
    return root


def result(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return found


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("objective", BY_OBJECTIVE)
def test_as_alone(tmp_path: Path, inputs: Path, alone: Path, objective: str, packing: bool) -> None:
    """The last run of a longer list enters a slot that another one has used."""
    layout = {"data.packing": packing, "train.micro_tokens": 96}
    with true_float64():
        ended = run_packed(configs_of(inputs, objective, **layout), tmp_path, slots=3)
    assert set(ended) == set(BY_OBJECTIVE[objective])
    for name in ended:
        assert said(tmp_path / name) == said(alone / objective / name)
        differences = largest_difference(tmp_path / name, alone / objective / name)
        assert max(differences) < BOUND, (name, differences)


def test_resumed_inside_a_rollout(tmp_path: Path, inputs: Path, alone: Path) -> None:
    """An engine's run goes on alone, and a run that began alone in an engine."""
    config = configs_of(inputs, "grpo")["short"]
    with true_float64():
        packed = Packed(config, tmp_path, slots=2)
        packed.enter("neighbour", config)
        packed.enter("left", config)
        while len(losses(tmp_path / "left")) < 3:
            packed.passes(1)
        assert len(losses(tmp_path / "left")) % config.train.rollout.steps
        packed.engine.leave(tmp_path / "left", "interrupted")
        packed.engine.leave(tmp_path / "neighbour", "pruned")
        packed.close()
        run(config, tmp_path / "left", resumes=True)

        with pytest.raises(BrokenRun):
            run(config, tmp_path / "entered", reporter=Recorder(fail_at=3))
        run_packed({"entered": config, "other": config}, tmp_path)
    for name in ("left", "entered"):
        assert result(tmp_path / name)["status"] == "completed"
        assert said(tmp_path / name) == said(alone / "grpo" / "short")
        differences = largest_difference(tmp_path / name, alone / "grpo" / "short")
        assert max(differences) < BOUND, (name, differences)


DIES = """
import os


def length(completions, **columns):
    if max(map(len, completions)) > 6:
        os._exit(7)
    return [float(len(one)) for one in completions]
"""


def test_a_reward_that_dies_for_one_run_ends_that_one(tmp_path: Path, inputs: Path) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    short = {"num_generations": 2, "max_completion_length": 4}
    changes = {"train.rollout": short, "rewards": [f"{tmp_path / 'dies.py'}:length"]}
    ill = {**changes, "train.rollout": {**short, "max_completion_length": 9}}
    well = configs_of(inputs, "grpo", **changes)["one step"]
    sick = configs_of(inputs, "grpo", **ill)["one step"]
    with true_float64():
        run(well, tmp_path / "alone")
        # Enters first, so that the healthy runs have the place behind its failure.
        packed = Packed(well, tmp_path, slots=3)
        for name, config in {"sick": sick, "a": well, "b": well}.items():
            packed.enter(name, config)
        ended = packed.finish(3)
    assert ended[0] == "sick"
    assert result(tmp_path / "sick")["status"] == "failed"
    assert "died 3 times in a row" in json.dumps(result(tmp_path / "sick"))
    for name in ("a", "b"):
        assert max(largest_difference(tmp_path / name, tmp_path / "alone")) < BOUND


def watched_config(inputs: Path, changes: dict[str, Any]) -> Config:
    watch = {
        "rewards": [f"{inputs / 'score.py'}:vowels"],
        "train.watch": ["vowels"],
        "train.rollout": {"max_completion_length": 6},
        "train.max_examples": 28,
    }
    return config_of(inputs, "sft", {**SHARED, **watch, **changes})


def test_rewards_that_are_watched(tmp_path: Path, inputs: Path) -> None:
    configs = {
        "a": watched_config(inputs, {"train.lr": 1e-2}),
        "b": watched_config(inputs, {"method.rank": 2}),
    }
    with true_float64():
        for name, config in configs.items():
            run(config, tmp_path / "alone" / name)
        run_packed(configs, tmp_path)
    for name in configs:
        assert max(largest_difference(tmp_path / name, tmp_path / "alone" / name)) < BOUND
        ours, theirs = (
            [line["eval_reward:vowels"] for line in metrics(root / name) if "eval_loss" in line]
            for root in (tmp_path, tmp_path / "alone")
        )
        assert ours == theirs
        assert len(ours) == 3


def test_slots_by_the_time_of_sampling(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 7 prompts, 3 answers each have 8 tokens; a pass takes as long for two slots as for one."""
    tried = []

    def seconds(one_pass: Callable[[int], int], counts: Sequence[int], _: object) -> Any:
        tried.extend(one_pass(count) for count in counts)
        return {count: 1 / count if count < 3 else 0.5 for count in counts}

    monkeypatch.setattr("raytune_ft.packed.engine.seconds_a_token", seconds)
    config = configs_of(inputs, "grpo")["short"]
    packed = Packed(config, tmp_path, slots=3)
    assert packed.engine.passes.settle(None, measured=True).startswith("2 slots (a token takes ")
    assert tried == [7 * 3 * 8 * count for count in (1, 2, 3)]
    packed.close()
