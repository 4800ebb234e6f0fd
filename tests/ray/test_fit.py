"""One run on a real cluster: lost workers, failures that are no loss of a worker, signals."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group_table

from raytune_ft.errors import ClusterError, Interrupted, ModelError, RunFailed
from raytune_ft.ray_backend.run_handle import fit
from raytune_ft.records import EvalMetrics, RunResult
from raytune_ft.rundir import RunSpec
from raytune_ft.train.result import load_result
from tests.ray.conftest import Inputs, assert_nothing_left, listening, workers
from tests.support.runs import largest_difference, losses

pytestmark = pytest.mark.ray


def spec_of(inputs: Inputs, run_dir: Path, **changes: object) -> RunSpec:
    run_dir.mkdir()
    return RunSpec(inputs.config(**changes), run_dir, inputs.data_dir)


@dataclass
class Watched:
    """A run of two workers, of which one was killed, and what was seen meanwhile."""

    run_dir: Path
    result: RunResult
    heard: list[tuple[int, int]]
    listening: set[str]


@pytest.fixture(scope="module")
def watched(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    spec = spec_of(inputs, tmp_path_factory.mktemp("watched") / "run", parallel__workers=2)
    heard: list[tuple[int, int]] = []
    addresses: set[str] = set()

    def kill_one(metrics: EvalMetrics, checkpoint: str | None) -> None:
        pids = sorted(process.pid for process in workers())
        heard.append((metrics.examples, pids[0]))
        addresses.update(listening())
        if metrics.examples == 140:
            os.kill(pids[-1], signal.SIGKILL)

    return Watched(spec.run_dir, fit(spec, kill_one), heard, addresses)


def test_a_killed_worker_is_replaced_and_the_numbers_stay(
    watched: Watched, undisturbed: Path
) -> None:
    assert watched.result.status == "completed"
    assert len({pid for _, pid in watched.heard}) == 2  # a second group, and only one
    assert [examples for examples, _ in watched.heard].count(0) == 1  # which resumed
    assert max(largest_difference(watched.run_dir, undisturbed)) < 1e-5
    assert_nothing_left()


def test_workers_and_cluster_listen_on_loopback_alone(watched: Watched) -> None:
    assert watched.listening
    assert watched.listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing_and_goes_on_later(
    inputs: Inputs, tmp_path: Path, undisturbed: Path
) -> None:
    # Also: a group may have one member.
    spec = spec_of(inputs, tmp_path / "run", parallel__strategy="ddp")
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(metrics: EvalMetrics, checkpoint: str | None) -> None:
        if metrics.examples == 140:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="--resume"):
        fit(spec, interrupt)
    assert_nothing_left()
    assert signal.getsignal(signal.SIGTERM) == before
    stopped = load_result(spec.run_dir)
    assert stopped is not None
    assert stopped.status == "interrupted"
    done = len(losses(spec.run_dir))
    assert 20 <= done < 40
    assert (spec.run_dir / "checkpoints" / f"step-{done:06d}").is_dir()  # of the last step
    assert fit(spec).status == "completed"
    assert max(largest_difference(spec.run_dir, undisturbed)) < 1e-5


@pytest.mark.slow
def test_a_wrong_input_is_raised_as_such_and_not_tried_again(
    inputs: Inputs, tmp_path: Path
) -> None:
    whole = inputs.config().model.path
    shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    spec = spec_of(inputs, tmp_path / "run", model__path=str(tmp_path / "model"))
    groups = len(placement_group_table())
    with pytest.raises(ModelError) as raised:
        fit(spec)
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)
    assert len(placement_group_table()) == groups + 1
    result = load_result(spec.run_dir)
    assert result is not None
    assert (result.status, result.error) == ("failed", f"ModelError: {raised.value}")
    assert_nothing_left()


@pytest.mark.slow
def test_a_worker_that_dies_for_good_fails_the_run(inputs: Inputs, tmp_path: Path) -> None:
    one_of_fsdp = {"parallel__strategy": "fsdp", "parallel__max_failures": 0}
    spec = spec_of(inputs, tmp_path / "run", **one_of_fsdp)
    examples: list[int] = []

    def kill(metrics: EvalMetrics, checkpoint: str | None) -> None:
        examples.append(metrics.examples)
        for process in workers():
            os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(RunFailed, match="a worker died") as raised:
        fit(spec, kill)
    assert "\n" not in str(raised.value)
    assert examples == [0]
    result = load_result(spec.run_dir)
    assert result is not None
    assert (result.status, result.error) == ("failed", f"RunFailed: {raised.value}")
    assert_nothing_left()


def test_more_workers_than_fit_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    spec = spec_of(inputs, tmp_path / "run", parallel__workers=4)
    before = threading.active_count()
    with pytest.raises(ClusterError) as raised:
        fit(spec)
    assert str(raised.value) == (
        "parallel.workers=4 with {CPU: 1} each needs 4 CPU; the cluster has 2 CPU on 1 node; "
        "write at most 2 workers or add nodes"
    )
    assert threading.active_count() <= before
    assert not list(spec.run_dir.iterdir())
