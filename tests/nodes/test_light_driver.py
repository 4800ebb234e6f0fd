"""On a cluster nothing is trained or measured in the driver, nor on a head without CPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray._private.state import actors

from raytune_ft import app
from raytune_ft.tensors.read import TensorFiles
from raytune_ft.train.report import Silent
from tests.nodes.conftest import Nodes, write_config
from tests.support.models import save_tiny_llama
from tests.support.runs import evaluations

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
WORKER = "RayTrainWorker"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def elsewhere(nodes: Nodes, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a driver in which no weight is read and no layer computes; in the end, there
    were workers, and all of them were on nodes that are not the head.
    """
    nodes.have(2)
    monkeypatch.setenv("RAY_ADDRESS", nodes.cluster.address)

    def refused(self: Any, *arguments: Any, **more: Any) -> Any:
        raise AssertionError(f"{type(self).__name__} in the driver")

    for kind in (torch.nn.Linear, torch.nn.Embedding):
        monkeypatch.setattr(kind, "forward", refused)
    for name in ("whole", "rows", "elements", "fill"):
        monkeypatch.setattr(TensorFiles, name, refused)
    before = set(actors())
    yield
    started = [each for key, each in actors().items() if key not in before]
    placed = {each["Address"]["NodeID"] for each in started if WORKER in each["ActorClassName"]}
    others = {node.node_id for node in nodes.nodes}
    assert placed
    assert placed <= others
    assert nodes.cluster.head_node.node_id not in placed
    told = {name for line in said for name in re.findall(r"\d/([0-9a-f]{8})", line)}
    assert told <= {node[:8] for node in others}


@pytest.fixture
def config(tmp_path: Path, said: list[str]) -> Path:
    train = {"max_examples": 80, "batch_size": 8, "lr": 3e-3}
    more = {"method": {"rank": 4}, "promote": {"merge": "greedy_soup", "top_k": 2}}
    return write_config(tmp_path, "light", train, 2, {"choice": [3e-3, 1e-2]}, **more)


def test_a_run_with_a_teacher_and_a_curriculum(
    elsewhere: None, config: Path, tmp_path: Path, said: list[str]
) -> None:
    """One worker; the base's losses and the teacher's logits come before it, a promotion after."""
    teacher = save_tiny_llama(tmp_path / "teacher", seed=5)
    overrides = [
        f"train.kd.teacher={teacher}",
        "train.kd.cache=disk",
        "train.objective=kd",
        "data.curriculum={by: base_loss}",
    ]
    done = app.train(config, overrides, False, said.append, lambda total: Silent())
    assert done.result is not None
    assert done.result.status == "completed"
    promotion = app.promote(done.path, False, said.append)
    assert promotion.check is not None
    text = "\n".join(said)
    assert "the base's loss on" in text
    assert "the teacher's logits are in" in text
    assert text.count("training on 1 worker (node ") == 1
    # Base losses, teacher, fold, two candidates on validation, two models held out.
    assert text.count("computing on 1 worker (node ") == 7
    assert evaluations(done.path)


@pytest.mark.parametrize("execution", ["isolated", "packed"])
def test_a_sweep_with_its_promotion(
    elsewhere: None, config: Path, said: list[str], execution: str
) -> None:
    done = app.sweep(config, [f"search.execution={execution}"], False, said.append)
    assert done.result["status"] == "completed"
    assert done.promotion is not None
    assert (done.promotion.path / "evaluation.json").is_file()
    assert any("soup of 1" in line for line in said)  # told by a worker


def test_an_evaluation(elsewhere: None, config: Path, tmp_path: Path, said: list[str]) -> None:
    found = app.evaluate(str(tmp_path / "inputs/model"), config, [], said.append)
    assert found["split"] == "validation"
    assert found["eval_loss"] > 0
    assert len([line for line in said if line.startswith("computing on 1 worker (node ")]) == 1
