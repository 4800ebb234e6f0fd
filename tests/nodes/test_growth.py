"""Nodes that join or are lost while a sweep runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raytune_ft import app
from tests.nodes.conftest import Nodes, nodes_in_use, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
Sweep = Callable[..., app.Swept]


@pytest.fixture
def sweep(tmp_path: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Eight trials, two or three at a time on one node; promotion is left out."""
    monkeypatch.setenv("RAY_ADDRESS", nodes.cluster.address)
    train = {"max_examples": 800, "batch_size": 4, "eval_every_examples": 80}
    file = write_config(tmp_path, "grown", train, 8, {"log_uniform": [1e-4, 1e-2]})

    class Search(app.Backend):
        def promote(self, path: Path, tell: object, *_: object, **__: object) -> None:  # type: ignore[override]
            """Not here."""

    def run(execution: str, tell: Callable[[str], None], *more: str) -> app.Swept:
        return app.sweep(file, [f"search.execution={execution}", *more], False, tell, Search())

    return run


@pytest.mark.parametrize("execution", ["isolated", "packed"])
def test_a_sweep_uses_a_node_that_joins(nodes: Nodes, sweep: Sweep, execution: str) -> None:
    while len(nodes.nodes) > 1:
        nodes.kill_one()
    nodes.have(1)
    said: list[str] = []
    used: list[int] = []

    def tell(line: str) -> None:
        said.append(line)
        used.append(len(nodes_in_use()))
        if line.startswith("trial-000") and len(nodes.nodes) == 1:
            nodes.have(2)

    done = sweep(execution, tell)
    assert [trial["status"] for trial in done.result["trials"]] == ["completed"] * 8
    assert any(line.startswith("nodes have joined: ") for line in said)
    assert (used[0], max(used)) == (0, 2)


def test_trials_of_a_lost_node_go_on_in_another_engine(nodes: Nodes, sweep: Sweep) -> None:
    nodes.have(2)
    said: list[str] = []
    killed: list[int] = []

    def tell(line: str) -> None:
        said.append(line)
        if not killed and "eval_loss" in line and len(nodes_in_use()) == 2:
            killed.append(len(said))
            nodes.kill_one()

    # The other engine still has trials when the lost one would start again.
    done = sweep("packed", tell, "train.max_examples=2400")
    assert killed
    assert [trial["status"] for trial in done.result["trials"]] == ["completed"] * 8
    assert any("there is no room for it any more" in line for line in said)
