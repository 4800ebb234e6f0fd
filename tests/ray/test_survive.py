"""Workers that hang, are stopped or are told to leave, on a real cluster."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from raytune_ft.config.load import dump_yaml
from raytune_ft.errors import Interrupted, RunFailed
from raytune_ft.ray_backend.run_handle import fit
from raytune_ft.ray_backend.sweep import run_sweep
from raytune_ft.records import EvalMetrics
from raytune_ft.rundir import RunSpec
from raytune_ft.train.result import load_result
from tests.ray.conftest import Inputs, assert_nothing_left, workers
from tests.ray.faults import HUNG, slow_worker, worker_short_of_memory, worker_that_hangs_once
from tests.support.runs import largest_difference, losses

pytestmark = pytest.mark.ray


def spec_of(inputs: Inputs, run_dir: Path, **changes: object) -> RunSpec:
    run_dir.mkdir()
    return RunSpec(inputs.config(parallel__workers=2, **changes), run_dir, inputs.data_dir)


@pytest.mark.slow
def test_a_hang_is_found_told_and_survived(
    inputs: Inputs, tmp_path: Path, undisturbed: Path
) -> None:
    spec = spec_of(inputs, tmp_path / "run", parallel__hang_timeout_s=8.0, parallel__max_failures=1)
    lines: list[str] = []
    at: dict[str, float] = {}

    def tell(line: str) -> None:
        lines.append(line)
        at.setdefault(line, time.time())

    result = fit(spec, tell=tell, worker=worker_that_hangs_once)
    assert result.status == "completed"
    began = (spec.run_dir / HUNG).stat().st_mtime
    begun = [line.partition("node ")[0] for line in lines if line.startswith("training")]
    assert begun == ["training on 2 workers ("] * 2
    (told,) = [line for line in lines if "no progress for 8 s" in line]
    assert "rank 1 is behind, at step 25, forward of micro-batch 1 of 1; rank 0 at step 25" in told
    assert told.endswith("; stacks are in hang.log")
    assert 8 <= at[told] - began < 8 + 8
    text = (spec.run_dir / "hang.log").read_text()
    first, second = text.index("\nrank 1 at step 25"), text.index("\nrank 0 at step 25")
    assert "in stand_still" in text[first:second]
    assert "in stand_still" not in text[second:]
    assert ", in backward" in text[second:]
    assert max(largest_difference(spec.run_dir, undisturbed)) < 1e-5
    assert_nothing_left()


@pytest.mark.slow
def test_workers_that_lack_memory_go_on_with_smaller_passes(
    inputs: Inputs, tmp_path: Path, undisturbed: Path
) -> None:
    spec = spec_of(inputs, tmp_path / "run", parallel__max_failures=0, train__micro_tokens=200)
    lines: list[str] = []
    result = fit(spec, tell=lines.append, worker=worker_short_of_memory)
    assert result.status == "completed"
    told = [line for line in lines if "CUDA out of memory" in line]
    assert [line.rpartition("; ")[2] for line in told] == [
        "going on with passes of at most 100 tokens",
        "going on with passes of at most 50 tokens",
    ]
    assert result.notes[-1] == "train.micro_tokens was lowered to 50: memory ran out with more"
    assert max(largest_difference(spec.run_dir, undisturbed)) < 1e-5
    assert_nothing_left()


@pytest.mark.slow
def test_a_stopped_worker_is_named_and_failures_are_bounded(inputs: Inputs, tmp_path: Path) -> None:
    spec = spec_of(inputs, tmp_path / "run", parallel__hang_timeout_s=6.0, parallel__max_failures=0)

    def stop(metrics: EvalMetrics, checkpoint: str | None) -> None:
        if metrics.examples == 70:
            os.kill(max(process.pid for process in workers()), signal.SIGSTOP)

    with pytest.raises(RunFailed, match=r"no progress for 6 s; rank \d did not answer") as raised:
        fit(spec, stop)
    result = load_result(spec.run_dir)
    assert result is not None
    assert (result.status, result.error) == ("failed", f"RunFailed: {raised.value}")
    assert_nothing_left()


@pytest.mark.slow
def test_a_worker_that_is_told_to_leave_saves_first(
    inputs: Inputs, tmp_path: Path, undisturbed: Path
) -> None:
    changes = {"parallel__max_failures": 0, "checkpoint__every_examples": 1000}
    spec = spec_of(inputs, tmp_path / "run", **changes)
    lines: list[str] = []
    groups: list[set[int]] = []
    steps: list[int] = []

    def terminate(metrics: EvalMetrics, checkpoint: str | None) -> None:
        groups.append({process.pid for process in workers()})
        if metrics.examples == 140:
            os.kill(max(groups[-1]), signal.SIGTERM)

    def tell(line: str) -> None:
        lines.append(line)
        saved = sorted((spec.run_dir / "checkpoints").glob("step-*"))
        steps.append(int(saved[-1].name.removeprefix("step-")) if saved else 0)
        steps.append(len(losses(spec.run_dir)) if saved else 0)

    assert fit(spec, terminate, tell, slow_worker).status == "completed"
    assert [line.partition("node ")[0] for line in lines] == ["training on 2 workers ("] * 2
    assert len(groups[-1] | groups[0]) == 4  # other processes
    assert steps[2] == steps[3] >= 20  # nothing of what was trained is lost
    assert max(largest_difference(spec.run_dir, undisturbed)) < 1e-5
    assert_nothing_left()


@pytest.mark.slow
def test_trials_save_before_their_sweep_is_interrupted(inputs: Inputs, tmp_path: Path) -> None:
    space = {"train.lr": {"log_uniform": [1e-4, 1e-2]}}
    search = {"trials": 1, "scheduler": None, "space": space, "execution": "isolated"}
    changes = {"train__max_examples": 7 * 200, "checkpoint__every_examples": 10_000}
    config = inputs.config(search=search, **changes)
    sweep_dir = tmp_path / "sweep"
    sweep_dir.mkdir()
    (sweep_dir / "config.yaml").write_text(dump_yaml(config))
    told: list[str] = []

    def interrupt(line: str) -> None:
        if "eval_loss" in line and "after 140" in line and not told:
            told.append(line.split(":")[0])
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_sweep(config, sweep_dir, inputs.data_dir, interrupt)
    assert_nothing_left()
    trial = sweep_dir / "trials" / told[0]
    done = len(losses(trial))
    assert 20 <= done < 200
    assert (trial / "checkpoints" / f"step-{done:06d}").is_dir()
    assert run_sweep(config, sweep_dir, inputs.data_dir, print, resume=True).status == "completed"
    assert len(losses(trial)) == 200
