"""Models of the hub on the nodes of a cluster: downloaded once a node, at one commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from raytune_ft.config.schema import ModelConfig, ParallelConfig
from raytune_ft.errors import RaytuneFtError
from raytune_ft.model.hub import Fetched, commit_of, fetch, pin
from raytune_ft.ray_backend.placement import Node, on_node, suitable_nodes
from raytune_ft.records import Tell

TELL_EVERY_S = 30.0


def fetch_for_group(
    model: ModelConfig, commit: str | None, workers: Sequence[Any], tell: Tell
) -> str:
    """Download a model to the nodes of a worker group, one worker on each, and let all workers load
    that commit: `commit`, or else what the model's revision is now.

    Raises:
        ModelError, StorageError: see `fetch`.
        RayActorError: a worker died.
    """
    one_each = {worker.metadata.node_id: worker for worker in reversed(workers)}
    commit = commit or str(_answer(workers[0].execute_async(commit_of, model)))
    asked = {node: worker.execute_async(fetch, model, commit) for node, worker in one_each.items()}
    _wait(asked, model, tell)
    ray.get([worker.execute_async(pin, model, commit) for worker in workers])
    return commit


def fetch_on_nodes(
    model: ModelConfig, parallel: ParallelConfig, tell: Tell
) -> list[tuple[Node, Fetched]]:
    """Download a model to every node that may hold workers.

    Raises:
        ModelError, StorageError: see `fetch`.
        ClusterError: see `suitable_nodes`.
    """
    nodes = suitable_nodes(parallel)
    commit = commit_of(model)
    answers = _wait({n.id: on_node(n, fetch, model, commit) for n in nodes}, model, tell)
    return [(node, answers[node.id]) for node in nodes]


def _wait(asked: Mapping[str, Any], model: ModelConfig, tell: Tell) -> dict[str, Fetched]:
    left = list(asked.values())
    while left:
        _, left = ray.wait(left, num_returns=len(left), timeout=TELL_EVERY_S)
        if left:
            tell(f"downloading {model.path} on {len(left)} node{'s' * (len(left) != 1)}")
    return {node: _answer(reference) for node, reference in asked.items()}


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RaytuneFtError):
            raise error.cause from error
        raise
