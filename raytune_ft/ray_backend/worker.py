"""What runs inside a Ray Train worker. Importing this module loads no torch."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.context import get_train_context

from raytune_ft.config.environment import grow_segments
from raytune_ft.config.load import choose_strategy
from raytune_ft.config.schema import Config
from raytune_ft.errors import RunFailed, first_line
from raytune_ft.estimate.hardware import require_gpu
from raytune_ft.imports import uncollected
from raytune_ft.layout import RESULT
from raytune_ft.model.quantise import skip_unused_bitsandbytes
from raytune_ft.ray_backend.metrics import RunGauges
from raytune_ft.ray_backend.vllm import Engines
from raytune_ft.records import EvalMetrics, StepMetrics, plain_of
from raytune_ft.rundir import RunSpec
from raytune_ft.train.report import Reporter, Several
from raytune_ft.train.stopping import Host
from raytune_ft.train.watchdog import Heartbeat, Standing

LOOPBACK = "127.0.0.1"
JOIN_S = 60.0
"""How long the ranks may take to reach each other, once all are there."""
NETWORK = "look at GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, and its log with NCCL_DEBUG=INFO"
LAST_WORDS_S = 5.0
"""Between the report of a hang and the end of the process: the driver asks the other ranks."""

WAIT_S = 5.0
"""How often workers without a run look whether their node is drained."""

# A worker process belongs to one group and ends with it. The run has a thread of its own; the main
# thread answers calls from Ray, so that the process can be asked while the run is busy or hangs.
_stop = threading.Event()
_pruned: set[int] = set()  # numbers of runs of a group, see `trial_worker`
_heart = Heartbeat()


class RayReporter:
    """Reports evaluations to Ray Train, on every rank, because `ray.train.report` is a barrier.

    Steps are not reported: Ray drains one report at a time, and `metrics.jsonl` has them already.
    """

    def step(self, metrics: StepMetrics) -> None: ...

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        """`checkpoint` is complete on disk, so the run may be stopped at once."""
        ray.train.report({**plain_of(metrics), "checkpoint": checkpoint})


def ask_to_stop() -> bool:
    """Ask the run to save after its step and to leave; False where it has nothing to save yet."""
    _stop.set()
    return _heart.watched


def ask_to_leave(number: int) -> None:
    """Ask this run of the group to leave after its step, without a checkpoint."""
    _pruned.add(number)


def heed_sigterm() -> None:
    """Make the first SIGTERM a request to stop; Ray would end the process within a step."""
    before = signal.getsignal(signal.SIGTERM)

    def request(number: int, frame: object) -> None:
        _stop.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, request)


def standing() -> Standing | None:
    """The progress of the run in this process; None while it does not train."""
    return _heart.standing() if _heart.watched else None


def _should_stop() -> bool:
    """Whether to save and leave: on request, or because a node of the group is drained."""
    return _stop.is_set() or get_train_context().preemption_context.preemption_info is not None


def _tell_of_hang(run: str, registry: Any, own: Standing) -> None:
    """Report a hang; if the run makes progress within `LAST_WORDS_S`, withdraw the report."""
    print(f"no progress for {own.silent_s:.0f} s\n{own.stacks}", file=sys.stderr, flush=True)
    seen = _heart.at
    try:
        ray.get(registry.post.remote(run, {"hang": own}), timeout=LAST_WORDS_S)
    except RayError:
        return
    threading.Event().wait(LAST_WORDS_S)
    if _heart.at != seen:
        registry.post.remote(run, {"awake": own.rank})


def train_worker(payload: dict[str, Any]) -> str:
    """The function of each worker: use the reserved threads and device, then train.

    Returns the status of the run. "interrupted" without a request to end restarts the group.
    """
    return _train(payload, payload["spec"])


def trial_worker(payload: dict[str, Any]) -> str:
    """The function of each worker of an isolated trial, whose workers train the next one too.

    So a sweep starts processes once, and not for each trial. A run that came to its own end or was
    pruned leaves its workers to the next; after any other end they end too, so that a fault of one
    trial stays that one's. Returns the status of the last run.
    """
    run, registry, number = payload["run"], payload["registry"], 0
    rank = ray.train.get_context().get_world_rank()
    while True:
        assigned = ray.get(registry.assignment.remote(run, number, WAIT_S))
        if assigned is None:
            if _should_stop():
                return "interrupted"
            continue
        number = assigned.number
        if not assigned.over:
            status = _train(payload, assigned.spec, partial(_pruned.__contains__, number))
            if not ray.get(registry.passes_on.remote(run, number, status, rank)):
                return status
            from raytune_ft.train.run import give_back_memory

            give_back_memory()
        ray.train.report({"over": number})


def _train(
    payload: dict[str, Any], spec: RunSpec, should_leave: Callable[[], bool] = lambda: False
) -> str:
    reporters: list[Reporter] = [RayReporter()]
    if ray.train.get_context().get_world_rank() == 0:
        (spec.run_dir / RESULT).unlink(missing_ok=True)  # of an earlier group
        reporters.insert(0, RunGauges(spec.run_dir))
    prepare_process(spec.config)
    with uncollected():
        from raytune_ft.train.run import run_training

    host = host_of(payload["run"], payload["registry"], should_leave)
    sampler = Engines(payload.get("engines", ()))  # a trial has none
    strategy = choose_strategy(spec.config)[0]
    return run_training(spec, strategy, Several(reporters), host, sampler).status


def prepare_process(config: Config) -> None:
    """Use the threads and the device that Ray reserved for this worker; loads torch.

    Raises:
        ClusterError: a GPU is reserved that torch cannot use.
    """
    skip_unused_bitsandbytes(config)
    parallel = config.parallel
    if parallel.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides GPUs only from workers that have some
    grow_segments()
    import torch

    # Ray may set OMP_NUM_THREADS too late: it starts processes before it leases them to a worker.
    torch.set_num_threads(max(1, int(parallel.resources["CPU"])))
    if parallel.device == "cuda":
        require_gpu(parallel.resources["GPU"], _node())
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())


def host_of(run: str, registry: Any, should_leave: Callable[[], bool] = lambda: False) -> Host:
    """The host of this worker's run: stops, hangs and progress go through Ray."""
    return Host(_should_stop, should_leave, partial(_tell_of_hang, run, registry), _heart)


@dataclass
class ProcessGroupConfig(BackendConfig):
    """Ray's TorchConfig, without the import of torch in every process that unpickles it.

    Ray's own loads torch into the controller of each run, which takes 1.5 s of CPU time and delays
    the start of the workers. With this class only the workers load it.
    """

    gpus: float = 0.0
    timeout_s: int = 1800

    @property
    def backend(self) -> str:
        """By the kind of device that a tensor is on."""
        return "cpu:gloo,cuda:nccl" if self.gpus else "gloo"

    @property
    def backend_cls(self) -> type[Backend]:
        return ProcessGroupBackend


class ProcessGroupBackend(Backend):
    """Sets up `torch.distributed` between the workers; a single worker is a group too.

    Workers on one node rendezvous on loopback, workers on several nodes at the address of rank 0's
    node. The rendezvous has no authentication, so it listens no wider than needed.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:
        """Called in the controller once the workers have started."""
        one_node = len(set(worker_group.execute(_node_id))) == 1
        meeting = worker_group.execute_single(0, _meet, one_node)
        size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join_process_group, meeting, rank, size, backend_config
                )
                for rank in range(size)
            ]
        )


@dataclass(frozen=True)
class Meeting:
    """Where the ranks rendezvous; `socket` is the file descriptor on which rank 0 listens."""

    address: str
    port: int
    socket: int
    one_node: bool


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _meet(one_node: bool) -> Meeting:
    address = LOOPBACK if one_node else ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # The socket stays open: a port that is only looked up could be taken while torch loads.
    listener = socket.create_server((address, 0), family=family)
    return Meeting(address, listener.getsockname()[1], listener.detach(), one_node)


def _node() -> str:
    return f"node {ray.util.get_node_ip_address()}"


def _join_process_group(meeting: Meeting, rank: int, size: int, config: ProcessGroupConfig) -> None:
    """Join, and try the way to the other ranks at once, on every kind of device.

    Raises:
        ClusterError: a GPU is reserved that torch cannot use.
        RunFailed: the other ranks are not reached within `JOIN_S` after all have loaded torch.
    """
    with uncollected():
        import torch
        import torch.distributed as dist
        from ray.train.torch import get_device
        from ray.train.torch.config import _set_torch_distributed_env_vars

    require_gpu(config.gpus, _node())
    if meeting.one_node:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", _loopback_interface())
    _set_torch_distributed_env_vars()
    timeout = timedelta(seconds=config.timeout_s)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        meeting.address,
        meeting.port,
        size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=meeting.socket if rank == 0 else None,
    )
    # A rank that is slow to load is waited for; from then on only the network can be slow.
    store.set(f"loaded/{rank}", "")
    store.wait([f"loaded/{each}" for each in range(size)], timeout)
    device = get_device() if config.gpus else None

    def join() -> None:
        dist.init_process_group(
            config.backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device,  # NCCL connects now, and not in the first step
        )
        for each in {"cpu", device or "cpu"}:
            dist.all_reduce(ones := torch.ones(1, device=each))
            assert ones.item() == size

    whole = f"the {size} workers over {config.backend}"
    _within(JOIN_S, join, f"rank {rank} on {_node()} does not reach {whole}")


def _within(limit_s: float, act: Callable[[], None], failure: str) -> None:
    """Call `act`, which may hang in native code; raises RunFailed where it does, or fails."""
    raised: list[BaseException] = []
    ended = threading.Event()

    def call() -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - told below
            raised.append(error)
        ended.set()

    threading.Thread(target=call, name="join", daemon=True).start()
    if not ended.wait(limit_s):
        raise RunFailed(f"{failure} within {limit_s:g} s; {NETWORK}")
    if raised:
        raise RunFailed(f"{failure}: {first_line(raised[0])}; {NETWORK}") from raised[0]


def _loopback_interface() -> str:
    """`lo` on Linux, `lo0` on macOS."""
    return next(name for _, name in socket.if_nameindex() if re.fullmatch(r"lo\d*", name))
