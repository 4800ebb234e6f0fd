"""A cluster of several nodes on this machine: raylets of their own, which can be killed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.util.placement_group import placement_group_table

from raytune_ft.config import yaml_text
from tests.ray.conftest import inputs, undisturbed
from tests.support.clusters import joined_cluster
from tests.support.runs import make_inputs

__all__ = ["inputs", "nodes", "undisturbed"]


@dataclass
class Nodes:
    """A head without CPUs, where the driver is, and nodes of one CPU each."""

    cluster: Cluster
    nodes: list[Any] = field(default_factory=list)
    leaving: list[Any] = field(default_factory=list)

    def have(self, count: int) -> None:
        """Start what is missing."""
        while len(self.nodes) < count:
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        self.cluster.wait_for_nodes()

    def kill_one(self) -> None:
        """As if its machine had lost power."""
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def drain_one(self, among: Collection[str], deadline_s: float) -> str:
        """As a cloud provider does that takes back a spot machine; its id."""
        node = next(node for node in self.nodes if node.node_id in among)
        self.nodes.remove(node)
        self.leaving.append(node)
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        client = ray._raylet.GcsClient(address=self.cluster.address)
        deadline_ms = int((time.time() + deadline_s) * 1000)
        accepted, why = client.drain_node(node.node_id, reason, "test", deadline_ms)
        assert accepted, why
        return str(node.node_id)

    def remove_drained(self) -> None:
        """What the provider does at the deadline."""
        while self.leaving:
            self.cluster.remove_node(self.leaving.pop(), allow_graceful=False)


def nodes_in_use() -> set[str]:
    """Ids of the nodes on which a worker group has a place. That of a trial's own process, on the
    driver's node, has no CPU.
    """
    groups = [each for each in placement_group_table().values() if each["state"] == "CREATED"]
    return {
        node
        for each in groups
        for bundle, node in each["bundles_to_node_id"].items()
        if each["bundles"][bundle].get("CPU")
    }


def write_config(
    folder: Path, name: str, train: dict[str, Any], trials: int, lr: dict[str, Any], **more: Any
) -> Path:
    """A file in `folder` for a search of the learning rate with a tiny Llama; runs are in `runs`.
    `more` are other sections.
    """
    model, rows = make_inputs(folder / "inputs")
    config: dict[str, Any] = {
        "name": name,
        "storage": str(folder / "runs"),
        "model": {"path": str(model)},
        "method": {"rank": 2},
        "data": {"train": {"path": str(rows)}, "validation": 0.2},
        "train": {"precision": "float32", **train},
        "search": {"trials": trials, "scheduler": None, "space": {"train.lr": lr}},
        **more,
    }
    file = folder / "config.yaml"
    file.write_text(yaml_text.dump(config))
    return file


@pytest.fixture(scope="package")
def nodes() -> Iterator[Nodes]:
    settings = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    with joined_cluster({"num_cpus": 0}, settings) as cluster:
        yield Nodes(cluster)
