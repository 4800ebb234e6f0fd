"""A packed sweep on a real cluster: many trials in one engine, with the numbers of single runs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from raytune_ft.config.load import dump_yaml, load_config
from raytune_ft.config.schema import Config
from raytune_ft.errors import Interrupted
from raytune_ft.search.ray_tune import run_sweep
from raytune_ft.search.results import SweepResult
from raytune_ft.train.report import Silent
from raytune_ft.train.run import run_training
from raytune_ft.train.spec import RunSpec
from tests.ray.conftest import Inputs, assert_nothing_left, processes, workers
from tests.support.runs import largest_difference, metrics

pytestmark = pytest.mark.ray

SEARCH: dict[str, Any] = {
    "trials": 6,
    "execution": "packed",
    "sampler": "random",
    "max_concurrent": 3,
    "scheduler": None,
    "space": {
        "train.lr": {"log_uniform": [1e-3, 1e-2]},
        "train.batch_size": {"choice": [5, 7, 12]},
        "method.rank": {"choice": [2, 4]},
    },
}


def begin(
    inputs: Inputs, sweep_dir: Path, parallel: dict[str, Any] | None = None, **search: Any
) -> Config:
    config = inputs.config(search=SEARCH | search, parallel=parallel or {})
    sweep_dir.mkdir()
    (sweep_dir / "config.yaml").write_text(dump_yaml(config))
    return config


def assert_as_alone(inputs: Inputs, sweep_dir: Path, trial: str, root: Path) -> None:
    """The trial's run against one of the same config in this process, as far as it went."""
    own = sweep_dir / "trials" / trial
    alone = root / trial
    alone.mkdir(parents=True)
    spec = RunSpec(load_config(own / "config.yaml"), alone, inputs.data_dir)
    assert run_training(spec, "single", Silent()).status == "completed"
    assert max(largest_difference(own, alone)) < 1e-5


def assert_sound(result: SweepResult, sweep_dir: Path) -> None:
    written = json.loads((sweep_dir / "result.json").read_text())
    assert (written["status"], written["execution"]) == ("completed", "packed")
    assert [row.id for row in result.trials] == [f"trial-{n:03d}" for n in range(6)]
    for row in result.trials:
        own = json.loads((sweep_dir / "trials" / row.id / "result.json").read_text())
        assert own["status"] == row.status
        best = sweep_dir / "trials" / row.id / own["best"]["checkpoint"]
        assert PeftConfig.from_pretrained(str(best)).r == row.params["method.rank"]


def test_an_engine_that_dies_comes_back_with_its_trials(inputs: Inputs, tmp_path: Path) -> None:
    sweep_dir = tmp_path / "sweep"
    config = begin(inputs, sweep_dir)
    killed: list[int] = []
    lines: list[str] = []

    def kill(line: str) -> None:
        lines.append(line)
        if "after 140" in line and not killed:
            killed.append(max(process.pid for process in workers()))
            os.kill(killed[0], signal.SIGKILL)

    result = run_sweep(config, sweep_dir, inputs.data_dir, kill)
    assert killed
    assert_nothing_left()
    assert_sound(result, sweep_dir)
    assert any("3 at a time in 2 engines" in line for line in lines)
    for row in result.trials:
        assert_as_alone(inputs, sweep_dir, row.id, tmp_path / "alone")


@pytest.mark.slow
def test_an_engine_of_two_workers_that_loses_one(inputs: Inputs, tmp_path: Path) -> None:
    sweep_dir = tmp_path / "sweep"
    config = begin(inputs, sweep_dir, {"workers": 2, "strategy": "fsdp"})
    groups: list[set[int]] = []
    lines: list[str] = []

    def kill(line: str) -> None:
        lines.append(line)
        if "after 140" in line:
            groups.append({process.pid for process in workers()})
            if len(groups) == 1:
                os.kill(max(groups[0]), signal.SIGKILL)

    result = run_sweep(config, sweep_dir, inputs.data_dir, kill)
    assert [len(group) for group in (groups[0], groups[-1])] == [2, 2]
    assert groups[0].isdisjoint(groups[-1])
    assert_nothing_left()
    assert_sound(result, sweep_dir)
    assert any("3 at a time in 1 engine " in line for line in lines)
    for row in result.trials:
        assert_as_alone(inputs, sweep_dir, row.id, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("engine_workers", [1, 2])
def test_an_interrupted_packed_sweep_goes_on(
    inputs: Inputs, tmp_path: Path, engine_workers: int
) -> None:
    sweep_dir = tmp_path / "sweep"
    config = begin(inputs, sweep_dir, {"workers": engine_workers})
    told: list[str] = []

    def interrupt(line: str) -> None:
        if "after 140" in line and not told:
            told.append(line.split(":")[0])
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_sweep(config, sweep_dir, inputs.data_dir, interrupt)
    assert_nothing_left()
    trial = sweep_dir / "trials" / told[0]
    steps = [line["step"] for line in metrics(trial) if "loss" in line]
    assert (trial / "checkpoints" / f"step-{steps[-1]:06d}").is_dir()
    result = run_sweep(config, sweep_dir, inputs.data_dir, told.append, resume=True)
    assert_nothing_left()
    assert_sound(result, sweep_dir)
    assert_as_alone(inputs, sweep_dir, trial.name, tmp_path / "alone")


def test_trials_that_end_badly_hurt_nobody_and_others_take_their_slots(
    inputs: Inputs, tmp_path: Path
) -> None:
    sweep_dir = tmp_path / "sweep"
    rates = [1e-8, 2e-3, 3e-3, 1e29]
    search = {
        "space": {
            "train.lr": {"choice": rates},
            "train.max_grad_norm": {"choice": [None]},
        },
        "sampler": "grid",
        "trials": 4,
        "max_concurrent": 2,
        "scheduler": {"name": "asha", "grace_examples": 70, "reduction_factor": 2},
    }
    config = begin(inputs, sweep_dir, **search)
    killed: list[str] = []

    def kill_a_driver(line: str) -> None:
        if "after 70" in line and not killed:
            drivers = processes("SweepTrial")
            killed.append(line.split(":")[0])
            os.kill(min(process.pid for process in drivers), signal.SIGKILL)

    result = run_sweep(config, sweep_dir, inputs.data_dir, kill_a_driver)
    assert_nothing_left()
    assert killed
    lost = [row for row in result.trials if "driver failed" in (row.error or "")]
    assert len(lost) == 1
    for row in result.trials:
        own = json.loads((sweep_dir / "trials" / row.id / "result.json").read_text())
        assert (own["status"], own["error"]) == (row.status, row.error)
        if row.params["train.lr"] == 1e29 and row not in lost:
            assert "Diverged" in (row.error or "")
    assert any(row.status == "completed" for row in result.trials)
