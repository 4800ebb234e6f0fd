"""Which Ray cluster this process uses, how quietly, and what fits on it."""

from __future__ import annotations

import logging
import math
import os
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import ray
from ray._private import ray_constants

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.errors import ClusterError, ConfigError, first_line
from raytune_ft.estimate.hardware import ACCELERATORS, RAY_NAMES, USABLE
from raytune_ft.format import GIB
from raytune_ft.ray_backend.placement import TYPE, Node, alive_nodes, suitable_nodes


@dataclass(frozen=True)
class Room:
    """A worker's memory (`usable`, bytes), its accelerator and the least memory of a node (`host`,
    bytes) are None where they are unknown.
    """

    nodes: int
    per_node: int
    usable: int | None
    accelerator: str | None
    host: int | None


def cluster_room(parallel: ParallelConfig) -> Room:
    """What the workers of a run get, as Ray would place them; raises as `suitable_nodes` does."""
    nodes = [node.resources for node in suitable_nodes(parallel)]
    resources_per_worker, workers = parallel.resources, parallel.max_workers
    usable = least_memory(nodes, resources_per_worker)
    accelerator = None
    memories = [int(node["memory"]) for node in nodes if "memory" in node]
    host = min(memories) if memories and len(memories) == len(nodes) else None
    if parallel.device == "cuda":
        accelerator = _least_accelerator(nodes, resources_per_worker)
    if parallel.placement.endswith("SPREAD"):
        taken = min(workers, len(worker_nodes(parallel))) or 1
        return Room(taken, -(-workers // taken), usable, accelerator, host)
    return Room(*packed(nodes, resources_per_worker, workers), usable, accelerator, host)


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


def gpu_count(parallel: ParallelConfig) -> int:
    """The GPUs of the suitable nodes; raises as `suitable_nodes` does."""
    return int(sum(node.resources.get("GPU", 0.0) for node in suitable_nodes(parallel)))


def cluster_worker_memory(parallel: ParallelConfig) -> int | None:
    """The least bytes that a worker has on a node that can hold one; None where unknown.

    Raises as `suitable_nodes` does.
    """
    nodes = [node.resources for node in suitable_nodes(parallel)]
    return least_memory(nodes, parallel.resources)


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
    return None if name is None else int(ACCELERATORS[name].memory * GIB * USABLE * gpus)


def _accelerator(node: Mapping[str, float]) -> str | None:
    names = [key.removeprefix(TYPE) for key in node if key.startswith(TYPE)]
    known = [RAY_NAMES.get(name, name) for name in names]
    return next((name for name in known if name in ACCELERATORS), None)


TRAIN_DEFAULTS = {
    # The controller polls its workers 4 times a second instead of every 2 s (Ray's default), so
    # that the end of a run and its evaluations arrive up to 2 s earlier.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # A run writes into its own directory; workers need not change into Ray's.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
LOCAL_DEFAULTS = {
    # One process less for each worker group: a cluster of one machine has no preemption.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
Nodes = Sequence[Mapping[str, float]]
"""The resources of each node, such as {"CPU": 8.0, "GPU": 1.0}."""
END_S = 3.0
"""How long a process of Ray may take to end after its cluster has ended."""
SOCKET_BYTES = 107
"""The longest path that Linux gives a socket."""
LONGEST_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""What Ray adds to its directory; the last number is a process id."""
SHORT_DIRS = ("/tmp", "/var/tmp", "/dev/shm")  # nosec B108 # Ray makes its folder there
STOP_GRACE = "RAYTUNE_FT_STOP_GRACE_S"
"""Seconds for the last checkpoint of an interrupted run; 30 by default."""


def stop_grace_s() -> float:
    """How long an interrupted run waits for its last checkpoint.

    Raises:
        ConfigError: the variable is not a number of seconds.
    """
    written = os.environ.get(STOP_GRACE, "30")
    try:
        seconds = float(written)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigError(
            f"{STOP_GRACE}={written}", "is not a number of seconds", "write one, such as 30"
        )
    return seconds


_ahead: Future[None] | None = None
"""The start of a cluster that goes on in a thread."""


@contextmanager
def starting() -> Iterator[None]:
    """A thread starts a local cluster while the caller does something else. It ends with the
    context; `connected` in the context uses it, and raises what kept it from starting. Nothing
    starts where this process has joined a cluster.

    Raises:
        ConfigError: see `stop_grace_s`.
    """
    global _ahead
    stop_grace_s()  # raises ConfigError
    if ray.is_initialized():
        yield
        return
    # Linux ends Ray's processes with the thread that started them, so it waits in its pool.
    with ThreadPoolExecutor(1, thread_name_prefix="start-ray") as pool:
        started = _ahead = pool.submit(connect)
        try:
            yield
        finally:
            _ahead = None
            try:
                wait([started])
            finally:  # also after a second signal; at once, or when the start has ended
                started.add_done_callback(lambda _: leave())


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Use the cluster that this process has joined; else join one and leave it at the end."""
    if _ahead is not None:
        _ahead.result()
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
    """Leave the cluster. One that was started here ends with all of its processes.

    A Ray worker that has disconnected from its cluster can deadlock while it exits (its publisher
    is destroyed together with the scheduler that it posts to). The cluster no longer knows it, and
    it would keep its memory, so it is killed here.
    """
    started = [process for process in psutil.Process().children(recursive=True) if _is_ray(process)]
    ray.shutdown()
    for process in psutil.wait_procs(started, timeout=END_S)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _is_ray(process: psutil.Process) -> bool:
    """Whether Ray started it as a worker: Ray sets the process title of all of them."""
    try:
        return "".join(process.cmdline()[:1]).startswith("ray::")
    except psutil.Error:
        return False


def connect(address: str | None = None, num_cpus: int | None = None) -> None:
    """Join the cluster at `address` or at RAY_ADDRESS, which Ray sets in a job; else start a local
    one.

    The local one ends with this process, has no dashboard and listens on loopback. `num_cpus`
    is the number of CPUs that it offers, by default those of the machine.

    Raises:
        ClusterError: no cluster answers at the address, or none can be started here.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    set_train_defaults()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None and address != "local":
        try:
            _check_answers(address)
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"address={address}",
                f"cannot be joined ({first_line(error)})",
                "start a cluster there with `ray start --head`, export RAY_AUTH_MODE=token if it "
                "requires a token, or unset RAY_ADDRESS to use this machine",
            ) from error
        return
    for name, value in LOCAL_DEFAULTS.items():
        os.environ.setdefault(name, value)
    folder = ray_directory()
    with _on_loopback(), _private_token():
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=num_cpus,
                _temp_dir=folder,
                **quiet,
            )
        except Exception as error:  # Ray raises bare ones too
            ray.shutdown()
            raise ClusterError(
                "Ray",
                f"cannot be started on this machine ({first_line(error)})",
                f"free memory and disk, or read why in {folder}/session_latest/logs",
            ) from error


ANSWER_S = 30.0
"""Long enough for a head that starts beside its driver. Ray alone tries for minutes."""


def _check_answers(address: str) -> None:
    """Raises ConnectionError where nothing answers at HOST:PORT within `ANSWER_S`. Other forms of
    an address are Ray's to judge.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    deadline = time.monotonic() + ANSWER_S
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(left, 0.1)).close()
            return
        except (OSError, OverflowError) as error:
            if left < 1:
                why = f"nothing answers there within {ANSWER_S:g} s: {error}"
                raise ConnectionError(why) from error
        time.sleep(0.5)


def ray_directory() -> str:
    """Where a local cluster keeps its sockets and logs: in the directory for temporary files, or,
    where a socket's path would become too long there, in the first short one.

    Raises:
        ClusterError: no directory is short enough and can be written.
    """
    longest = SOCKET_BYTES - len(LONGEST_SOCKET)
    written = [value for name in ("RAY_TMPDIR", "TMPDIR") if (value := os.environ.get(name))]
    for folder in (*written, *SHORT_DIRS):
        if len(os.fsencode(folder)) <= longest and os.access(folder, os.W_OK | os.X_OK):
            return f"{folder}/ray"
    raise ClusterError(
        f"TMPDIR={os.environ.get('TMPDIR', '')}",
        f"cannot hold Ray's sockets: none of {', '.join((*written, *SHORT_DIRS))} has at most "
        f"{longest} bytes and can be written",
        "export RAY_TMPDIR with such a directory",
    )


def ray_storage() -> TemporaryDirectory[str]:
    """For the files that Ray Train and Ray Tune keep about a run, which are not read afterwards."""
    return TemporaryDirectory(prefix="raytune-ft-", ignore_cleanup_errors=True)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray cluster that is started inside has the address 127.0.0.1, and binds only to that.

    This is Ray's own switch for macOS and Windows. Passing the address to `ray.init` would not be
    enough: Ray replaces a loopback address by the machine's, and then listens on all interfaces.
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


@contextmanager
def _private_token() -> Iterator[None]:
    """Ray keeps the token of its clusters in `~/.ray/auth_token`, which Ray 2.60.0 makes readable
    for every user of the machine. Only its owner can read it afterwards, and one that Ray makes
    inside is in a folder that only its owner can enter.
    """
    token = Path(os.path.expanduser("~/.ray/auth_token"))
    if _close(token):
        logging.getLogger(__name__).warning("%s could be read by others; its mode is 0600", token)
    with suppress(OSError):  # Ray says what it cannot write
        token.parent.mkdir(mode=0o700)
    try:
        yield
    finally:
        _close(token)


def _close(file: Path) -> bool:
    """Take a file of this user from everybody else; whether they could read it."""
    with suppress(OSError):
        facts = file.lstat()
        open_ = stat.S_ISREG(facts.st_mode) and facts.st_mode & 0o077
        if open_ and facts.st_uid == os.getuid():
            file.chmod(0o600)
            return True
    return False


def set_train_defaults(others: Mapping[str, str] | None = None) -> None:
    """Set what Ray Train reads in the process that calls `fit` and hands on to its actors.

    `others`: the driver's `train_environment`, in a trial's process, which calls `fit` for it.
    """
    for name, value in {**TRAIN_DEFAULTS, **(others or {})}.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)


def train_environment() -> dict[str, str]:
    """The environment variables of this process that Ray Train and `stop_grace_s` read."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("RAY_TRAIN_") or name == STOP_GRACE
    }


def whole_groups(
    nodes: Nodes, resources_per_worker: Mapping[str, float], workers: int, placement: str = "PACK"
) -> int:
    """Groups of `workers` that fit on nodes with these resources; a worker is never split.

    Ray packs a group onto as few nodes as it can and spreads it where it must, so that groups
    are limited by the number of single workers that fit, node by node. The strict placements do
    not: see `parallel.placement`.
    """
    singles = _singles(nodes, resources_per_worker)
    if placement == "STRICT_PACK":
        return sum(each // workers for each in singles)
    groups = sum(singles) // workers
    while placement == "STRICT_SPREAD" and sum(min(s, groups) for s in singles) < groups * workers:
        groups -= 1
    return groups


def most_workers(nodes: Nodes, resources: Mapping[str, float], placement: str) -> int:
    """The workers of the largest group that fits."""
    singles = _singles(nodes, resources)
    if placement == "STRICT_PACK":
        return max(singles, default=0)
    return sum(map(bool, singles) if placement == "STRICT_SPREAD" else singles)


def _singles(nodes: Nodes, resources_per_worker: Mapping[str, float]) -> list[int]:
    """How many workers fit on each node."""
    need = {name: amount for name, amount in resources_per_worker.items() if amount > 0}
    if not need:
        raise ValueError("a worker that needs no resources fits any number of times")
    # 1e-6, because int(0.3 / 0.1) is 2 in floating point.
    return [
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in need.items())
        for node in nodes
    ]


def require_capacity(parallel: ParallelConfig, nodes: Nodes) -> int:
    """How many runs or trials fit at a time on these nodes.

    An elastic run is counted with its largest number of workers. Where not even one run of that
    size fits, but one of the smallest size does, the answer is 1.

    Raises:
        ClusterError: they cannot hold one run with the fewest workers.
    """
    resources, workers = parallel.resources, parallel.min_workers
    groups = whole_groups(nodes, resources, parallel.max_workers, parallel.placement)
    if groups > 0:
        return groups
    fits = most_workers(nodes, resources, parallel.placement)
    if fits >= workers:
        return 1
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
    strict = parallel.placement.startswith("STRICT")
    placed = f" under parallel.placement={parallel.placement}" * strict
    chosen = parallel.accelerator is not None or parallel.label_selector
    raise ClusterError(
        f"parallel.workers={parallel.workers} with {{{shown}}} each{placed}",
        f"needs {'at least ' * parallel.elastic}{total}; "
        f"the cluster has {has} on {len(nodes)} {'suitable ' * bool(chosen)}"
        f"node{'s' * (len(nodes) != 1)}",
        f"write at most {fits} workers or add nodes"
        if fits
        else "write smaller parallel.resources_per_worker or add nodes",
    )


def worker_nodes(parallel: ParallelConfig) -> list[Node]:
    """The suitable nodes that can hold a worker; raises as `suitable_nodes` does."""
    nodes = suitable_nodes(parallel)
    fits = _singles([node.resources for node in nodes], parallel.resources)
    return [node for node, count in zip(nodes, fits, strict=True) if count]


def node_count() -> int:
    """The number of alive nodes of the cluster."""
    return len(alive_nodes())


def _number(amount: float) -> str:
    return f"{amount:g}"
