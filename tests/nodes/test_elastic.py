"""Nodes that die, are drained or arrive while a run goes on: the numbers stay."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from raytune_ft.ray_backend import run_handle, worker_group
from raytune_ft.records import EvalMetrics
from raytune_ft.rundir import RunSpec
from tests.nodes.conftest import Nodes, nodes_in_use
from tests.ray.conftest import Inputs, workers
from tests.ray.faults import slow_worker
from tests.support.runs import largest_difference, losses

pytestmark = pytest.mark.ray

fit = partial(run_handle.fit, worker=slow_worker)
"""A run that is slow enough for a node to die or to arrive before its end."""


def spec_of(inputs: Inputs, run_dir: Path, **changes: object) -> RunSpec:
    return RunSpec(inputs.config(**changes), run_dir, inputs.data_dir)


def sizes(lines: list[str]) -> list[str]:
    """Without the nodes."""
    return [line.partition(" (")[0] for line in lines]


@pytest.mark.slow
def test_a_run_goes_on_with_the_workers_that_are_left(
    nodes: Nodes, inputs: Inputs, tmp_path: Path, undisturbed: Path
) -> None:
    nodes.have(3)
    (tmp_path / "run").mkdir()
    spec = spec_of(inputs, tmp_path / "run", parallel__workers=[1, 3])
    lines: list[str] = []
    seen: dict[int, int] = {}

    def kill(metrics: EvalMetrics, checkpoint: str | None) -> None:
        seen[metrics.examples] = len(workers())
        if metrics.examples == 140:
            nodes.kill_one()

    result = fit(spec, kill, lines.append)
    assert result.status == "completed"
    assert sizes(lines) == ["training on 3 workers", "training on 2 workers"]
    assert (seen[140], seen[277]) == (3, 2)
    assert max(largest_difference(spec.run_dir, undisturbed)) < 1e-5


@pytest.mark.slow
def test_a_drained_node_is_left_with_a_checkpoint(
    nodes: Nodes, inputs: Inputs, tmp_path: Path, undisturbed: Path
) -> None:
    """A fixed number of workers, one of which moves; not one of `max_failures`."""
    nodes.have(3)
    (tmp_path / "run").mkdir()
    changes = {"parallel__max_failures": 0, "checkpoint__every_examples": 1000}
    spec = spec_of(inputs, tmp_path / "run", parallel__workers=2, **changes)
    used: list[set[str]] = []
    drained: list[str] = []
    kept: list[tuple[int, int]] = []

    def drain(metrics: EvalMetrics, checkpoint: str | None) -> None:
        used.append(nodes_in_use())
        if metrics.examples == 70:
            drained.append(nodes.drain_one(used[-1], 60))

    def tell(line: str) -> None:
        saved = sorted((spec.run_dir / "checkpoints").glob("step-*"))
        if saved:
            kept.append((int(saved[-1].name.removeprefix("step-")), len(losses(spec.run_dir))))

    assert fit(spec, drain, tell).status == "completed"
    assert drained[0] in used[0]
    assert drained[0] not in used[-1]
    assert len(used[-1]) == 2
    assert kept[0][0] == kept[0][1] >= 10  # nothing of what was trained is lost
    assert max(largest_difference(spec.run_dir, undisturbed)) < 1e-5
    nodes.remove_drained()


@pytest.mark.slow
def test_a_run_takes_on_workers_that_arrive(
    nodes: Nodes,
    inputs: Inputs,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_group, "GROW_AFTER_S", 1.0)
    while len(nodes.nodes) > 1:
        nodes.kill_one()
    nodes.have(1)
    (tmp_path / "run").mkdir()
    changes = {"parallel__max_failures": 0, "checkpoint__every_examples": 1000}
    spec = spec_of(inputs, tmp_path / "run", parallel__workers=[1, 2], **changes)
    lines: list[str] = []

    def add(metrics: EvalMetrics, checkpoint: str | None) -> None:
        if metrics.examples == 70:
            nodes.have(2)

    assert fit(spec, add, lines.append).status == "completed"
    assert sizes(lines) == ["training on 1 worker", "training on 2 workers"]
    assert max(largest_difference(spec.run_dir, undisturbed)) < 1e-5
