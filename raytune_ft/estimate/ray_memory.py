"""How much memory a worker has on the joined cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import ray

from raytune_ft.estimate.hardware import ACCELERATORS, GIB, RAY_NAMES, USABLE

_TYPE = "accelerator_type:"


def cluster_worker_memory(resources_per_worker: Mapping[str, float]) -> int | None:
    """The least that a worker has on any node that can hold one; None where nobody knows."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return least_memory(nodes, resources_per_worker)


def least_memory(
    nodes: Iterable[Mapping[str, float]], resources_per_worker: Mapping[str, float]
) -> int | None:
    """Of nodes with these resources. Ray says of a GPU what type it is, and of a node how much
    memory its tasks may have.
    """
    gpus, cpus = (resources_per_worker.get(name, 0.0) for name in ("GPU", "CPU"))
    found: list[int | None] = []
    for node in nodes:
        if node.get("CPU", 0.0) < cpus or node.get("GPU", 0.0) < gpus:
            continue
        if gpus > 0:
            found.append(_accelerator_memory(node))
        else:
            workers = max(1, int(node["CPU"] / cpus + 1e-6))
            found.append(int(node["memory"] / workers) if "memory" in node else None)
    known = [memory for memory in found if memory is not None]
    return min(known) if known and len(known) == len(found) else None


def cluster_accelerator(resources_per_worker: Mapping[str, float]) -> str | None:
    """The one with the least memory, of nodes that can hold a worker; None where none is known."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    fitting = [n for n in nodes if n.get("GPU", 0.0) >= resources_per_worker.get("GPU", 0.0)]
    names = [name for node in fitting if (name := _accelerator(node)) is not None]
    return min(names, key=lambda name: ACCELERATORS[name].memory, default=None)


def _accelerator_memory(node: Mapping[str, float]) -> int | None:
    name = _accelerator(node)
    return None if name is None else int(ACCELERATORS[name].memory * GIB * USABLE)


def _accelerator(node: Mapping[str, float]) -> str | None:
    names = [key.removeprefix(_TYPE) for key in node if key.startswith(_TYPE)]
    known = [RAY_NAMES.get(name, name) for name in names]
    return next((name for name in known if name in ACCELERATORS), None)
