"""The line between a run's worker group and whoever started it, and how a group is ended.

Ray Train tells its caller nothing between `fit()` and its return, hands out no handle to stop
with, and leaves placement groups behind where a controller dies (ray issues 54305, 62753). So the
controller of each run registers itself, its workers and its placement group on a switchboard, an
actor of the driver, which outlives runs and trials; whoever has to can then end all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.callback import (
    ControllerCallback,
    ReportCallback,
    WorkerGroupCallback,
)
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_ft.errors import OutOfMemory, RaytuneFtError, RunFailed

ABORT_TIMEOUT_S = 30.0
GONE_TIMEOUT_S = 30.0


@dataclass
class Group:
    """What a run holds on the cluster."""

    controller: Any = None
    placement_groups: list[PlacementGroup] = field(default_factory=list)
    workers: list[Any] = field(default_factory=list)


class Switchboard:
    """An asynchronous actor. `slots` is how many runs may hold workers at a time."""

    def __init__(self, slots: int) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._groups: dict[str, Group] = {}
        self._events: dict[str, list[dict[str, Any]]] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._stopping = False

    async def open(self, run: str) -> None:
        """Wait for a free slot; until `close`, `run` may hold workers."""
        await self._slots.acquire()
        self._groups[run], self._events[run], self._news[run] = Group(), [], asyncio.Event()

    async def close(self, run: str) -> None:
        """The workers of `run` are gone."""
        if self._groups.pop(run, None) is not None:
            self._slots.release()

    async def register(
        self, run: str, controller: Any, group: PlacementGroup | None, workers: list[Any]
    ) -> None:
        """Called by the controller of `run`: at its start, and when it has started workers."""
        held = self._groups.setdefault(run, Group())
        held.controller = controller
        if group is not None:
            held.placement_groups.append(group)
            held.workers = workers

    async def group(self, run: str) -> Group:
        """What `run` holds."""
        return self._groups.get(run, Group())

    async def open_runs(self) -> list[str]:
        """Runs that may still hold workers."""
        return list(self._groups)

    async def post(self, run: str, event: dict[str, Any]) -> None:
        """Leave a message for whoever started `run`."""
        if run in self._events:
            self._events[run].append(event)
            self._news[run].set()

    async def take(self, run: str, timeout_s: float) -> tuple[list[dict[str, Any]], bool]:
        """New messages of `run`, waiting for the first; and whether everybody shall stop."""
        if run in self._news and not self._stopping:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news[run].wait(), timeout_s)
            self._news[run].clear()
        events, self._events[run] = self._events.get(run, []), []
        return events, self._stopping

    async def stop_everybody(self) -> None:
        """Whoever waits for a message is told to stop instead."""
        self._stopping = True
        for news in self._news.values():
            news.set()


def start_switchboard(slots: int) -> Any:
    """An actor of 0 CPU on this node: it lives exactly as long as the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here)(Switchboard)
    return actor.remote(slots)


class RunWatch(ControllerCallback, WorkerGroupCallback, ReportCallback):
    """Runs inside the controller of `run`: registers the group, passes on reports and errors."""

    def __init__(self, run: str, switchboard: Any) -> None:
        self._run, self._switchboard = run, switchboard
        self._fatal: RaytuneFtError | None = None

    def after_controller_start(self, train_run_context: Any) -> None:
        """The handle that can abort the run."""
        me = ray.get_runtime_context().current_actor
        ray.get(self._switchboard.register.remote(self._run, me, None, []))

    def after_worker_group_start(self, worker_group: Any) -> None:
        """At the first start and at every restart."""
        state = worker_group.get_worker_group_state()
        group = state.placement_group_handle.placement_group
        workers = [worker.actor for worker in state.workers]
        me = ray.get_runtime_context().current_actor
        ray.get(self._switchboard.register.remote(self._run, me, group, workers))

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        """Once every rank has reported; the ranks report the same."""
        self._switchboard.post.remote(self._run, {"report": metrics[0]})

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Remembers an error that would come again."""
        for error in worker_group_status.errors.values():
            cause = getattr(error, "_base_exc", error)
            if isinstance(cause, RaytuneFtError):
                self._fatal = cause

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """An error that we raised ourselves is no lost worker: a restart would meet it again.

        What is raised here ends the run instead of restarting its workers.
        """
        if self._fatal is not None:
            raise self._fatal


def end_group(run: str, switchboard: Any) -> None:
    """Abort the controller of `run`; return when its workers and placement groups are gone.

    Safe to call twice, while the group starts, and after its controller died.
    """
    group: Group = ray.get(switchboard.group.remote(run))
    if group.controller is not None:
        # Ends the workers, the placement group and the controller itself.
        with contextlib.suppress(RayError):
            ray.get(group.controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
        ray.kill(group.controller)
        group = ray.get(switchboard.group.remote(run))
    for placement_group in group.placement_groups:
        remove_placement_group(placement_group)
    for worker in group.workers:
        ray.kill(worker)
    _wait_until_gone(group)
    ray.get(switchboard.close.remote(run))


def _wait_until_gone(group: Group) -> None:
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while any(
        placement_group_table(each).get("state", "REMOVED") != "REMOVED"
        for each in group.placement_groups
    ):
        if time.monotonic() > deadline:
            raise RunFailed(f"a placement group was not given back within {GONE_TIMEOUT_S:g} s")
        time.sleep(0.05)
    for worker in group.workers:
        with contextlib.suppress(RayError):
            ray.get(worker.get_metadata.remote(), timeout=max(0.1, deadline - time.monotonic()))


def failure_of(error: BaseException) -> RaytuneFtError:
    """The one-line cause of what Ray raised when a run failed for good."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, RaytuneFtError):
            return cause
    texts = [_one_line(cause) for cause in causes]
    for cause, text in zip(causes, texts, strict=True):
        lower = str(cause).lower()
        if (
            isinstance(cause, MemoryError | ray.exceptions.OutOfMemoryError)
            or "outofmemory" in type(cause).__name__.lower()
            or "(oom)" in lower
            or "out of memory" in lower
        ):
            return OutOfMemory(text)
    return RunFailed(texts[-1])


def _causes(error: BaseException) -> list[BaseException]:
    """From the outermost to the innermost, over the ranks; lost peers before what others say."""
    inner: list[BaseException] = []
    failures = getattr(error, "worker_failures", None)
    if failures:
        # A killed worker is the cause, and what its peers say of the lost connection is not.
        ranks = sorted(failures.values(), key=lambda e: isinstance(e, WorkerHealthCheckFailedError))
        inner = [cause for failure in ranks for cause in _causes(failure)]
    elif isinstance(error, UserExceptionWithTraceback):
        inner = _causes(error._base_exc)
    elif isinstance(error, WorkerHealthCheckFailedError):
        inner = _causes(error.health_check_failure)
    elif getattr(error, "controller_failure", None) is not None:
        inner = _causes(error.controller_failure)  # type: ignore[attr-defined]
    elif isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        inner = _causes(error.cause)
    return [error, *inner]


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ray.exceptions.RayActorError):
        return f"a worker died: {_death(lines)}"
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _death(lines: list[str]) -> str:
    """Ray's story of a dead actor is long; the sentence with the reason is the one to show."""
    for line in lines:
        if "exited" in line or "killed" in line or "died" in line:
            reason = line
            break
    else:
        reason = lines[-1] if lines else "unknown"
    return reason[:300]
