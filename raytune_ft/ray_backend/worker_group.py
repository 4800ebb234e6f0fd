"""What the controller of a run tells the switchboard, how a group is ended, why one failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
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
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError
from ray.train.v2.api.preemption import PreemptionInfo
from ray.util.placement_group import placement_group_table, remove_placement_group

from raytune_ft.errors import OutOfMemory, RaytuneFtError, RunFailed
from raytune_ft.ray_backend.registry import Group
from raytune_ft.ray_backend.worker import heed_sigterm

ABORT_TIMEOUT_S = 30.0
GONE_TIMEOUT_S = 30.0


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
        ray.get([worker.execute.remote(heed_sigterm) for worker in workers])
        self._switchboard.post.remote(self._run, {"workers": len(workers)})

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        """Once every rank has reported; the ranks report the same."""
        self._switchboard.post.remote(self._run, {"report": metrics[0]})

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Remembers an error that would come again, and restarts a group that was moved off.

        Workers that saved and left, though nobody asked for the end of the run, were told to by
        Ray (a node is drained), by a SIGTERM, or to make room for more of them. That is not one
        of `max_failures`.

        A worker that lost its peer hears of it from torch or from a socket, in these two types,
        and often before Ray knows. Anything else that was raised comes from the run itself.
        """
        statuses = worker_group_status.worker_statuses.values()
        errors = [status.error for status in statuses]
        if worker_group_status.finished and not any(errors) and self._goes_on(statuses):
            info = worker_group_status.get_preemption_info() or PreemptionInfo(None, {})
            raise PreemptionError(info)
        if any(isinstance(error, WorkerHealthCheckFailedError) for error in errors):
            return  # somebody is lost, whatever the others make of it
        for error in errors:
            if not isinstance(error, UserExceptionWithTraceback):
                continue
            if not isinstance(error._base_exc, RuntimeError | OSError):
                self._fatal = failure_of(error)

    def _goes_on(self, statuses: Iterable[Any]) -> bool:
        if any(status.return_value != "interrupted" for status in statuses):
            return False
        return not ray.get(self._switchboard.is_ending.remote(self._run))

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """What is raised here ends the run instead of restarting its workers."""
        if self._fatal is not None:
            raise self._fatal


class StartsInARow(DefaultFailurePolicy):
    """Ray's own, but starts that failed are forgotten once a group has run."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """See `FailurePolicy`; an error that is not of a controller is one of a group that ran."""
        if not isinstance(training_failed_error, ControllerError):
            self._controller_failures = 0
        return super().make_decision(training_failed_error)


def end_group(run: str, switchboard: Any) -> None:
    """Abort the controller of `run`; return when its workers and placement groups are gone.

    Safe to call twice, while the group starts, and after its controller died. In any case the
    run's slot is free afterwards.

    Raises:
        RunFailed: they are not gone after half a minute.
    """
    try:
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
    finally:
        # What is still reserved then is Ray's to give back; nobody else has to wait for that.
        ray.get(switchboard.close.remote(run))


def end_groups_of(owner: str, switchboard: Any) -> None:
    """End what `owner` has left behind, whose process died.

    Raises:
        RunFailed: not all of it is gone; it is on its way.
    """
    for run in ray.get(switchboard.give_up.remote(owner)):
        end_group(run, switchboard)


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
