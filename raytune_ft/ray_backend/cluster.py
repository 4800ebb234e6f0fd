"""Which Ray cluster this process uses, how quietly, and what fits on it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
from ray._private import ray_constants

from raytune_ft.config.environment import in_ray_job
from raytune_ft.config.schema import ParallelConfig
from raytune_ft.errors import ClusterError, ConfigError, first_line

TRAIN_DEFAULTS = {
    # The controller looks at its workers 4 times a second: an empty run ends, and an evaluation
    # reaches the scheduler, up to 2 s earlier than with Ray's default of 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # Runs keep their own directory, so nobody has to be moved into Ray's.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
LOCAL_DEFAULTS = {
    # One process less for each worker group: nobody takes this machine away piece by piece.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
END_S = 3.0
"""What a process of Ray's may take to end when its cluster is gone."""
STOP_GRACE = "RAYTUNE_FT_STOP_GRACE_S"
"""Seconds for the checkpoint of a run that is interrupted, 30 by default."""


def stop_grace_s() -> float:
    """How long an interrupted run waits for its last checkpoint.

    Raises:
        ConfigError: the variable is no number of seconds.
    """
    written = os.environ.get(STOP_GRACE, "30")
    try:
        seconds = float(written)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"{STOP_GRACE}={written}", "is no number of seconds", "write 30")
    return seconds


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Use the cluster that this process has joined already, or join one and leave it again."""
    if ray.is_initialized():
        set_train_defaults()
        yield
        return
    connect(address)
    try:
        yield
    finally:
        leave()


def leave() -> None:
    """Leave the cluster; one that was started here is gone, to its last process.

    A worker of Ray's that has said goodbye to its cluster may wait for ever for a lock of its own
    while it ends (its publisher is destroyed together with the scheduler that it posts to). Nobody
    knows it any more, and it would keep its memory.
    """
    started = [process for process in psutil.Process().children(recursive=True) if _is_ray(process)]
    ray.shutdown()
    for process in psutil.wait_procs(started, timeout=END_S)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _is_ray(process: psutil.Process) -> bool:
    """Ray names its workers so, whatever they run."""
    try:
        return "".join(process.cmdline()[:1]).startswith("ray::")
    except psutil.Error:
        return False


def connect(address: str | None = None, num_cpus: int | None = None) -> None:
    """Join the cluster at `address`, at RAY_ADDRESS or around this Ray job; else start a local one.

    The local one ends with this process, has no dashboard and listens on loopback. `num_cpus`
    is what it claims to have, by default what the machine has.

    Raises:
        ClusterError: nobody answers at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS") or ("auto" if in_ray_job() else None)
    set_train_defaults()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None and address != "local":
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"address={address}",
                f"is no cluster that can be joined ({first_line(error)})",
                "start one with `ray start --head`, export RAY_AUTH_MODE=token if it wants one, "
                "or unset RAY_ADDRESS to use this machine",
            ) from error
        return
    for name, value in LOCAL_DEFAULTS.items():
        os.environ.setdefault(name, value)
    with _on_loopback():
        ray.init(address="local", include_dashboard=False, num_cpus=num_cpus, **quiet)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started inside has the address 127.0.0.1, and its servers bind to that alone.

    This is Ray's own switch for macOS and Windows. An address that is passed to `ray.init` does
    not do: Ray replaces a loopback address by the machine's, and then listens everywhere.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    written = os.environ.get(name)
    os.environ[name] = "0"  # for the processes that are started
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[name]
        if written is not None:
            os.environ[name] = written


def set_train_defaults(others: Mapping[str, str] | None = None) -> None:
    """Ray Train reads these in the process that calls `fit` and hands them on to its actors.

    `others` is what `train_environment` said in the driver, for a process that calls `fit` in
    its stead.
    """
    for name, value in {**TRAIN_DEFAULTS, **(others or {})}.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)


def train_environment() -> dict[str, str]:
    """What steers Ray Train, and how long it may take to stop, in this process."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("RAY_TRAIN_") or name == STOP_GRACE
    }


def bundles_that_fit(resources_per_worker: Mapping[str, float], workers: int) -> int:
    """How many whole groups of `workers` the alive nodes hold, if nobody else used them."""
    return whole_groups(_alive_nodes(), resources_per_worker, workers)


def whole_groups(
    nodes: Sequence[Mapping[str, float]], resources_per_worker: Mapping[str, float], workers: int
) -> int:
    """Groups of `workers` that fit on nodes with these resources; a worker is never split.

    Ray packs a group onto as few nodes as it can and spreads it where it must, so that groups
    are limited by the number of single workers that fit, node by node.
    """
    need = {name: amount for name, amount in resources_per_worker.items() if amount > 0}
    if not need:
        raise ValueError("a worker that needs nothing fits without end")
    # The small term keeps 0.3 / 0.1 from being 2.
    singles = sum(
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in need.items())
        for node in nodes
    )
    return singles // workers


def require_capacity(parallel: ParallelConfig) -> int:
    """How many runs or trials fit at a time; refused where not even one does.

    An elastic one is counted with its most workers; where not even one such group fits, there is
    room for one that is smaller.

    Raises:
        ClusterError: the cluster cannot hold one group of the fewest workers.
    """
    resources, workers = parallel.resources_per_worker, parallel.min_workers
    groups = bundles_that_fit(resources, parallel.max_workers)
    if groups > 0:
        return groups
    if bundles_that_fit(resources, workers) > 0:
        return 1
    nodes = _alive_nodes()
    need = {name: amount for name, amount in resources.items() if amount > 0}
    shown = ", ".join(f"{name}: {_number(amount)}" for name, amount in need.items())
    lacking = [
        name
        for name, amount in need.items()
        if sum(node.get(name, 0.0) for node in nodes) < amount * workers
    ] or list(need)
    total = " and ".join(f"{_number(need[name] * workers)} {name}" for name in lacking)
    has = " and ".join(
        f"{_number(sum(node.get(name, 0.0) for node in nodes))} {name}" for name in lacking
    )
    fits = whole_groups(nodes, resources, 1)
    raise ClusterError(
        f"parallel.workers={parallel.workers} with {{{shown}}} each",
        f"needs {'at least ' * parallel.elastic}{total}; "
        f"the cluster has {has} on {len(nodes)} node{'s' * (len(nodes) != 1)}",
        f"write at most {fits} workers or add nodes"
        if fits
        else "write smaller parallel.resources_per_worker or add nodes",
    )


def node_count() -> int:
    """Alive nodes of the cluster."""
    return len(_alive_nodes())


def _alive_nodes() -> list[dict[str, float]]:
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _number(amount: float) -> str:
    return f"{amount:g}"
