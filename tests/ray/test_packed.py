"""A packed sweep on a real cluster: many trials in one engine, with the numbers of single runs."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import PeftConfig
from ray.tune.schedulers import TrialScheduler

from raytune_ft.config.load import dump_yaml, load_config
from raytune_ft.config.schema import Config
from raytune_ft.config.search import AshaConfig
from raytune_ft.errors import Interrupted
from raytune_ft.ray_backend import packed_worker
from raytune_ft.ray_backend.schedulers import scheduler_for
from raytune_ft.ray_backend.sweep import run_sweep
from raytune_ft.rundir import RunSpec
from raytune_ft.search.results import SweepResult
from raytune_ft.train.report import Silent
from raytune_ft.train.run import run_training
from tests.ray.conftest import Inputs, assert_nothing_left, processes, workers
from tests.ray.faults import engine_short_of_memory
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
    inputs: Inputs,
    sweep_dir: Path,
    parallel: dict[str, Any] | None = None,
    micro_tokens: int | None = None,
    **search: Any,
) -> Config:
    config = inputs.config(
        search=SEARCH | search, parallel=parallel or {}, train__micro_tokens=micro_tokens or "auto"
    )
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


@pytest.mark.slow
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
def test_an_engine_that_lacks_memory_gives_slots_back_and_loses_no_trial(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_worker, "engine_worker", engine_short_of_memory)
    sweep_dir = tmp_path / "sweep"
    parallel = {"resources_per_worker": {"CPU": 2}, "max_failures": 0}
    config = begin(inputs, sweep_dir, parallel, 50, max_concurrent=4)
    lines: list[str] = []
    result = run_sweep(config, sweep_dir, inputs.data_dir, lines.append)
    assert_nothing_left()
    assert_sound(result, sweep_dir)
    assert any("4 at a time in 1 engine " in line for line in lines)
    assert any(
        line.endswith("CUDA out of memory. Tried to allocate 2.00 GiB; going on with 2 slots")
        for line in lines
    )
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
    config = begin(inputs, sweep_dir, {"resources_per_worker": {"CPU": 2}}, **search)
    killed: list[str] = []

    def kill_a_driver(line: str) -> None:
        if "after 70" in line and not killed:
            drivers = processes("SweepTrial")
            killed.append(line.split(":")[0])
            os.kill(min(process.pid for process in drivers), signal.SIGKILL)

    result = run_sweep(config, sweep_dir, inputs.data_dir, kill_a_driver)
    assert_nothing_left()
    assert killed
    lost = [row for row in result.trials if "process failed" in (row.error or "")]
    assert len(lost) == 1
    for row in result.trials:
        own = json.loads((sweep_dir / "trials" / row.id / "result.json").read_text())
        assert (own["status"], own["error"]) == (row.status, row.error)
        if row.params["train.lr"] == 1e29 and row not in lost:
            assert "Diverged" in (row.error or "")
    assert any(row.status == "completed" for row in result.trials)


@pytest.mark.slow
def test_branches_a_budget_and_the_median_rule(inputs: Inputs, tmp_path: Path) -> None:
    sweep_dir = tmp_path / "sweep"
    search = {
        "trials": 40,  # far more than the budget is for, however fast they are stopped
        "space": {
            "train.lr": {"log_uniform": [1e-5, 1e-2]},
            "method.rslora": {"choice": [True, False]},
            "method.alpha": {"uniform": [8, 64], "when": {"method.rslora": [True]}},
        },
        "scheduler": {"name": "median", "grace_examples": 70, "min_trials": 2},
        "budget": {"examples": 1200},
    }
    config = begin(inputs, sweep_dir, **search)
    result = run_sweep(config, sweep_dir, inputs.data_dir, print)
    assert_nothing_left()
    assert (result.status, result.execution) == ("completed", "packed")
    assert result.ended_by == "examples"
    assert 4 <= len(result.trials) < 40
    assert {row.status for row in result.trials} <= {"completed", "pruned"}
    # Who runs when the budget is used up goes on to its next evaluation.
    assert 1200 <= sum(row.examples for row in result.trials) < 1200 + 3 * 100
    branches = {row.params["method.rslora"] for row in result.trials}
    assert branches == {True, False}
    for row in result.trials:
        own = load_config(sweep_dir / "trials" / row.id / "config.yaml")
        assert ("method.alpha" in row.params) == row.params["method.rslora"]
        assert own.method.rslora == row.params["method.rslora"]  # type: ignore[union-attr]
    first = next(row.id for row in result.trials if row.status == "completed")
    assert_as_alone(inputs, sweep_dir, first, tmp_path / "alone")


REPORT = re.compile(r"(trial-\d+): eval_loss \S+ after (\d+) examples")


@pytest.mark.slow
def test_asha_decides_alike_on_the_same_reports(inputs: Inputs, tmp_path: Path) -> None:
    """The order in which each sweep reported, replayed with its own losses and the other's."""
    values: dict[str, dict[tuple[str, int], float]] = {}
    orders: dict[str, list[tuple[str, int]]] = {}
    pruned: dict[str, dict[str, int]] = {}
    for execution in ("packed", "isolated"):
        sweep_dir = tmp_path / execution
        halving = {"name": "asha", "grace_examples": 70, "reduction_factor": 2}
        config = begin(inputs, sweep_dir, execution=execution, scheduler=halving, trials=4)
        lines: list[str] = []
        result = run_sweep(config, sweep_dir, inputs.data_dir, lines.append)
        assert result.execution == execution
        heard = [found.groups() for line in lines if (found := REPORT.match(line))]
        orders[execution] = [(name, int(examples)) for name, examples in heard]
        pruned[execution] = {r.id: r.examples for r in result.trials if r.status == "pruned"}
        values[execution] = {
            (row.id, line["examples"]): line["eval_loss"]
            for row in result.trials
            for line in metrics(sweep_dir / "trials" / row.id)
            if "eval_loss" in line
        }
    assert pruned["packed"]
    packed, isolated = values["packed"], values["isolated"]
    common = packed.keys() & isolated.keys()
    assert len(common) >= 4
    assert max(abs(packed[report] - isolated[report]) for report in common) < 1e-5
    for execution, order in orders.items():
        for losses in (isolated | packed, packed | isolated):
            assert _stopped_by_asha(order, losses) == pruned[execution], (execution, order)


def _stopped_by_asha(
    order: list[tuple[str, int]], losses: dict[tuple[str, int], float]
) -> dict[str, int]:
    config = AshaConfig(grace_examples=70, reduction_factor=2)
    rule = scheduler_for(config, 277, "eval_loss", "min")
    trials, stopped = {}, {}
    for name, examples in order:
        if name not in trials:
            trials[name] = SimpleNamespace(config={"trial": name, "budget": 277})
            rule.on_trial_add(None, trials[name])
        report = {"examples": examples, "eval_loss": losses[name, examples]}
        if rule.on_trial_result(None, trials[name], report) == TrialScheduler.STOP:
            stopped[name] = examples
    return stopped
