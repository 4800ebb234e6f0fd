"""Which nodes of the cluster may hold workers: `parallel.accelerator` and `label_selector`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from raytune_ft.config.explain import shown_value
from raytune_ft.config.schema import ParallelConfig
from raytune_ft.errors import ClusterError

TYPE = "accelerator_type:"
"""Ray gives a node a resource of this prefix for each type of accelerator that it has."""
_MANY = re.compile(r"in\((.*)\)")


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    id: str
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def name(self) -> str:
        """For people; several nodes may have one address."""
        return f"{self.address} ({self.id[:8]})"


def alive_nodes() -> list[Node]:
    """Every node of the joined cluster."""
    return [
        Node(each["NodeID"], each["NodeManagerAddress"], dict(each["Resources"]), each["Labels"])
        for each in ray.nodes()
        if each["Alive"]
    ]


def staying_nodes() -> list[Node]:
    """Those that are alive and not drained."""
    leaving = ray._private.state.state.get_draining_nodes()
    return [node for node in alive_nodes() if node.id not in leaving]


def suitable_nodes(parallel: ParallelConfig, nodes: Iterable[Node] | None = None) -> list[Node]:
    """Those of `nodes`, by default of all, that have the accelerator and the labels.

    Raises:
        ClusterError: there is none; it says what the nodes have.
    """
    every = alive_nodes() if nodes is None else list(nodes)
    accelerator, selector = parallel.accelerator, parallel.label_selector
    having = [n for n in every if accelerator is None or TYPE + accelerator in n.resources]
    found = [n for n in having if matches(n.labels, selector)]
    if found or not every:
        return found
    if not having:
        raise ClusterError(
            f"parallel.accelerator={accelerator}",
            f"is on no node; the nodes have {_accelerators(every)}",
            "write one that a node has, or add nodes",
        )
    beside = "" if accelerator is None else f" together with parallel.accelerator={accelerator}"
    raise ClusterError(
        f"parallel.label_selector={shown_value(selector)}",
        f"matches no node{beside}; the nodes have {_labels(every, selector)}",
        "write labels that a node has, or add nodes",
    )


def for_ray(selector: Mapping[str, str]) -> dict[str, str] | None:
    """A selector for Ray, which takes the blank in `in(a, b)` for a part of the second value."""
    return {key: value.replace(" ", "") for key, value in selector.items()} or None


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether Ray would place a worker with `selector` on a node with `labels`."""
    return all(_matches(labels.get(key), wanted) for key, wanted in selector.items())


def _matches(label: str | None, wanted: str) -> bool:
    positive = wanted.removeprefix("!")
    many = _MANY.fullmatch(positive)
    values = [value.strip() for value in many[1].split(",")] if many else [positive]
    return (label in values) == (positive == wanted)


def on_node(node: Node, function: Callable[..., Any], *arguments: Any) -> Any:
    """A reference to the result of a call in a process of that node, which reserves nothing."""
    remote: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    return remote.options(label_selector={"ray.io/node-id": node.id}).remote(*arguments)


def _accelerators(nodes: Sequence[Node]) -> str:
    found = Counter(
        name.removeprefix(TYPE)
        for node in nodes
        for name in node.resources
        if name.startswith(TYPE)
    )
    return _counted(found) or "none that Ray knows"


def _labels(nodes: Sequence[Node], keys: Iterable[str]) -> str:
    return ", ".join(
        _counted(Counter(f"{key}={n.labels[key]}" for n in nodes if key in n.labels))
        or f"no label {key}"
        for key in keys
    )


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(found.items()))
