"""Nodes, accelerators and memory that workers get on the joined cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from raytune_ft.estimate.hardware import ACCELERATORS, GIB, RAY_NAMES, USABLE, gpu_part
from raytune_ft.ray_backend.cluster import Nodes, alive_nodes, whole_groups

_TYPE = "accelerator_type:"


@dataclass(frozen=True)
class Room:
    """A worker's memory (`usable`, bytes) and accelerator are None where they are unknown."""

    nodes: int
    per_node: int
    usable: int | None
    accelerator: str | None


def cluster_room(resources_per_worker: Mapping[str, float], workers: int) -> Room:
    """What `workers` workers get, as Ray would place them."""
    nodes = alive_nodes()
    usable = least_memory(nodes, resources_per_worker)
    accelerator = None
    if resources_per_worker.get("GPU", 0.0) > 0:
        accelerator = _least_accelerator(nodes, resources_per_worker)
    return Room(*packed(nodes, resources_per_worker, workers), usable, accelerator)


def packed(
    nodes: Nodes, resources_per_worker: Mapping[str, float], workers: int
) -> tuple[int, int]:
    """(nodes that a group takes, workers on each); Ray takes as few nodes as possible.

    Where the cluster is too small, more nodes like its largest are assumed.
    """
    room = sorted((whole_groups([n], resources_per_worker, 1) for n in nodes), reverse=True)
    most = room[0] if room and room[0] > 0 else workers
    taken = placed = 0
    while placed < workers:
        placed += (room[taken] if taken < len(room) else 0) or most
        taken += 1
    return taken, -(-workers // taken)


def cluster_worker_memory(resources_per_worker: Mapping[str, float]) -> int | None:
    """The least bytes that a worker has on a node that can hold one; None where unknown."""
    return least_memory(alive_nodes(), resources_per_worker)


def least_memory(
    nodes: Iterable[Mapping[str, float]], resources_per_worker: Mapping[str, float]
) -> int | None:
    """As `cluster_worker_memory`, for these nodes.

    Ray names the type of a node's GPUs, and the memory that tasks on a node may use.
    """
    gpus, cpus = (resources_per_worker.get(name, 0.0) for name in ("GPU", "CPU"))
    found: list[int | None] = []
    for node in nodes:
        if node.get("CPU", 0.0) < cpus or node.get("GPU", 0.0) < gpus:
            continue
        if gpus > 0:
            found.append(_accelerator_memory(node, gpus))
        else:
            workers = max(1, int(node["CPU"] / cpus + 1e-6))
            found.append(int(node["memory"] / workers) if "memory" in node else None)
    known = [memory for memory in found if memory is not None]
    return min(known) if known and len(known) == len(found) else None


def _least_accelerator(
    nodes: Iterable[Mapping[str, float]], resources_per_worker: Mapping[str, float]
) -> str | None:
    """The one with the least memory, of nodes that can hold a worker; None where none is known."""
    fitting = [n for n in nodes if n.get("GPU", 0.0) >= resources_per_worker.get("GPU", 0.0)]
    names = [name for node in fitting if (name := _accelerator(node)) is not None]
    return min(names, key=lambda name: ACCELERATORS[name].memory, default=None)


def _accelerator_memory(node: Mapping[str, float], gpus: float) -> int | None:
    name = _accelerator(node)
    return None if name is None else int(ACCELERATORS[name].memory * GIB * USABLE * gpu_part(gpus))


def _accelerator(node: Mapping[str, float]) -> str | None:
    names = [key.removeprefix(_TYPE) for key in node if key.startswith(_TYPE)]
    known = [RAY_NAMES.get(name, name) for name in names]
    return next((name for name in known if name in ACCELERATORS), None)
