"""What runs inside a Ray Train worker. Importing this module loads no torch."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.context import get_train_context

from raytune_ft.config.load import choose_strategy
from raytune_ft.config.schema import ParallelConfig
from raytune_ft.layout import RESULT
from raytune_ft.records import EvalMetrics, StepMetrics, plain_of
from raytune_ft.train.spec import RunSpec
from raytune_ft.train.watchdog import Heartbeat, Host, Standing

LOOPBACK = "127.0.0.1"
LAST_WORDS_S = 5.0
"""Between the report of a hang and the end of the process, for whoever asks the others."""

# Of this process, which is a worker of one group and then ends. The run is in a thread of it; the
# main thread answers to Ray, which is how it can be reached while the run is busy or hangs.
_stop = threading.Event()
_heart = Heartbeat()


class RayReporter:
    """Evaluations go to Ray Train, on every rank, since `ray.train.report` is a barrier.

    Steps do not: Ray drains one report at a time, and `metrics.jsonl` has them already.
    """

    def step(self, metrics: StepMetrics) -> None:
        """Nothing."""

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        """The checkpoint is committed before, so that whoever stops the run finds it whole."""
        ray.train.report({**plain_of(metrics), "checkpoint": checkpoint})


def ask_to_stop() -> bool:
    """Save after the current step and leave. False: there is nothing to save yet."""
    _stop.set()
    return _heart.watched


def heed_sigterm() -> None:
    """The first SIGTERM asks to stop; Ray would end the process in the middle of a step."""
    before = signal.getsignal(signal.SIGTERM)

    def request(number: int, frame: object) -> None:
        _stop.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, request)


def standing() -> Standing | None:
    """Where the run of this process is; None when it does not train."""
    return _heart.standing() if _heart.watched else None


def _should_stop() -> bool:
    """Also when a node of the group is drained: Ray tells every worker of the group."""
    return _stop.is_set() or get_train_context().preemption_context.preemption_info is not None


def _tell_of_hang(run: str, switchboard: Any, own: Standing) -> None:
    """A beat that comes meanwhile saves this process: then the alarm is taken back."""
    print(f"no progress for {own.silent_s:.0f} s\n{own.stacks}", file=sys.stderr, flush=True)
    seen = _heart.at
    try:
        ray.get(switchboard.post.remote(run, {"hang": own}), timeout=LAST_WORDS_S)
    except RayError:
        return
    threading.Event().wait(LAST_WORDS_S)
    if _heart.at != seen:
        switchboard.post.remote(run, {"awake": own.rank})


def train_worker(payload: dict[str, Any]) -> str:
    """The function of each worker: threads and devices as reserved, then the run itself.

    Returns how the run ended, of which "interrupted" is not the end where nobody asked for it.
    """
    spec: RunSpec = payload["spec"]
    if ray.train.get_context().get_world_rank() == 0:
        (spec.run_dir / RESULT).unlink(missing_ok=True)  # what an earlier group left
    use_reserved(spec.config.parallel)

    from raytune_ft.train.run import run_training

    host = host_of(payload["run"], payload["switchboard"])
    return run_training(spec, choose_strategy(spec.config)[0], RayReporter(), host).status


def use_reserved(parallel: ParallelConfig) -> None:
    """The threads and the device that were reserved for this worker; loads torch."""
    resources = parallel.resources_per_worker
    if not resources.get("GPU", 0):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides GPUs only from workers that have some
    import torch

    # OMP_NUM_THREADS comes too late in a process that was started before it was leased.
    torch.set_num_threads(max(1, int(resources.get("CPU", 1))))
    if torch.cuda.is_available():
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())


def host_of(run: str, switchboard: Any) -> Host:
    """Ray Train as the host of this worker's run."""
    return Host(_should_stop, partial(_tell_of_hang, run, switchboard), _heart)


@dataclass
class ProcessGroupConfig(BackendConfig):
    """Ray's TorchConfig, less the import of torch in every process that merely unpickles it.

    Ray's own loads torch into the controller of each run, which takes 1.5 s of a core and stands
    in the way of the workers' start. Here only the workers load it.
    """

    backend: str = "gloo"
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> type[Backend]:
        """See `BackendConfig`."""
        return ProcessGroupBackend


class ProcessGroupBackend(Backend):
    """Sets up `torch.distributed` between the workers, of which there may be only one.

    Workers on one node meet on loopback, and those on several at the address of rank 0's node:
    nothing here asks who is calling, so nothing listens where nobody needs it.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:
        """Called in the controller once the workers are there."""
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
    """Where the ranks find each other; `socket` is rank 0's, which listens already."""

    address: str
    port: int
    socket: int
    one_node: bool


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _meet(one_node: bool) -> Meeting:
    address = LOOPBACK if one_node else ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # A port that was only looked up might be somebody else's by the time torch is loaded.
    listener = socket.create_server((address, 0), family=family)
    return Meeting(address, listener.getsockname()[1], listener.detach(), one_node)


def _join_process_group(meeting: Meeting, rank: int, size: int, config: ProcessGroupConfig) -> None:
    import torch.distributed as dist
    from ray.train.torch.config import _set_torch_distributed_env_vars

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
    dist.init_process_group(
        config.backend, store=store, rank=rank, world_size=size, timeout=timeout
    )


def _loopback_interface() -> str:
    """`lo` on Linux, `lo0` on macOS."""
    return next(name for _, name in socket.if_nameindex() if re.fullmatch(r"lo\d*", name))
