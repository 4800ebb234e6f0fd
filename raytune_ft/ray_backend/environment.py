"""Whether the nodes give workers the environment variables that a run needs; never their values."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence

import ray
from ray.exceptions import RayError

from raytune_ft.config.environment import names_in
from raytune_ft.config.load import asked_rewards
from raytune_ft.config.metrics import measured_rewards
from raytune_ft.config.schema import Config
from raytune_ft.errors import ClusterError, first_line
from raytune_ft.model.hub import trained_models
from raytune_ft.ray_backend.cluster import worker_nodes
from raytune_ft.ray_backend.placement import Node, on_node
from raytune_ft.records import Tell

OF_THE_HUB = "HF_TOKEN"
OF_TRACKERS = {
    "wandb": ("WANDB_API_KEY", "WANDB_BASE_URL"),
    "mlflow": (
        *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN"),
        *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    ),
    "trackio": (OF_THE_HUB,),
}
OF_THE_NETWORK = ("NCCL_", "GLOO_")
ANSWER_S = 60.0


NOT_SET = "is not set for workers, and it is set here"


def check_environment(config: Config, tell: Tell) -> None:
    """See `lacking`.

    Raises:
        ClusterError: a variable that is needed is missing somewhere; it names all of them.
    """
    if missing := lacking(config, tell):
        raise ClusterError(
            missing,
            NOT_SET,
            "export it there before `ray start` (on Kubernetes: in the pods of workers)",
        )


def lacking(config: Config, tell: Tell) -> str:
    """The variables that a run needs and that are missing where it may put workers, as `NAME on
    node NODE`; empty where none is. One process starts for a moment on each such node.

    `tell` hears of settings of the network that differ, which may be meant.

    Raises:
        ClusterError: a node does not answer, or see `suitable_nodes`.
    """
    nodes = worker_nodes(config.parallel)
    several = len(nodes) > 1 and config.parallel.max_workers > 1
    names = needed(config, os.environ, several)
    if not names:
        return ""
    seen = _ask(nodes, names)
    without = {name: [node.name for node in nodes if seen[node.id][name] is None] for name in names}
    if any(without.values()):
        return " and ".join(
            f"{name} on node {', '.join(where)}" for name, where in without.items() if where
        )
    for name, own in _seen(names).items():
        others = [node.name for node in nodes if seen[node.id][name] != own]
        if others:
            tell(f"{name} differs between here and node {', '.join(others)}; workers use their own")
    return ""


def needed(config: Config, environ: Mapping[str, str], several: bool) -> list[str]:
    """Names of what is set here and workers use. `several`: workers may talk over a network.

    Values of `${NAME}` in the config travel with the run, but for those of rewards, which workers
    read. In promotion, a judge that compares is asked by the driver.
    """
    used = {name for tracker in config.tracking.to for name in OF_TRACKERS.get(tracker, ())}
    if trained_models(config):
        used.add(OF_THE_HUB)
    measured = [reward for reward in measured_rewards(config) if not reward.compares]
    rewards = [*measured, *asked_rewards(config)]
    used |= names_in([reward.model_dump() for reward in rewards])
    here = {name for name in used if environ.get(name)}
    if several:
        here |= {name for name in environ if name.startswith(OF_THE_NETWORK)}
    return sorted(here)


def _ask(nodes: Sequence[Node], names: Sequence[str]) -> dict[str, dict[str, str | None]]:
    asked = {node.id: on_node(node, _seen, names) for node in nodes}
    answers = {}
    for node in nodes:
        try:
            answers[node.id] = ray.get(asked[node.id], timeout=ANSWER_S)
        except RayError as error:
            raise ClusterError(
                f"node {node.name}",
                f"does not start a process ({first_line(error)})",
                "look at its logs, or remove it from the cluster",
            ) from error
    return answers


def _seen(names: Iterable[str]) -> dict[str, str | None]:
    """None for a name that is not set in this process; else `set`, and for settings of the network
    a hash, by which nodes are compared.
    """
    return {name: _mark(name, os.environ.get(name)) for name in names}


def _mark(name: str, value: str | None) -> str | None:
    if value is None or not name.startswith(OF_THE_NETWORK):
        return None if value is None else "set"
    return hashlib.sha256(value.encode()).hexdigest()
