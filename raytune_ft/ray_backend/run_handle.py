"""One run on a worker group: start it, hear from it, end it, read what it left."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2.api.exceptions import TrainingFailedError

from raytune_ft.errors import Interrupted, RaytuneFtError, RunFailed
from raytune_ft.layout import HANG_LOG, RESULT
from raytune_ft.ray_backend.cluster import connected, require_capacity, stop_grace_s
from raytune_ft.ray_backend.registry import Ended, Note, Report, StopRequested, start_switchboard
from raytune_ft.ray_backend.worker import ask_to_stop, standing, train_worker
from raytune_ft.ray_backend.worker_group import Worker, end_group, failure_of, train_group
from raytune_ft.records import EvalMetrics, RunResult
from raytune_ft.train.result import load_result, read_result, write_ended
from raytune_ft.train.spec import RunSpec
from raytune_ft.train.watchdog import Standing, append_hang_log, interruptible, log_text, summary

REGISTER_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 2.0
"""For a worker's main thread, which does nothing but answer."""
OnEvaluation = Callable[[EvalMetrics, str | None], None]


class TrainJob:
    """A worker group in the background of this process; see `Job`.

    `worker` is what its workers run, with `more` beside the run itself.
    """

    def __init__(self, spec: RunSpec, switchboard: Any, worker: Worker, **more: Any) -> None:
        self.spec = spec
        self._worker, self._more = worker, more
        # Ray resumes a run whose name it knows; ours resume from their own checkpoints.
        self._name = f"{spec.run_dir.name}-{uuid.uuid4().hex[:8]}"
        self._switchboard = switchboard
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name=self._name, daemon=True)
        self._pending: list[Report | Note] = []
        self._hang: str | None = None  # of the group that runs now
        self._silent: set[int] = set()  # its ranks that said they hang

    def start(self) -> None:
        """See `Job`."""
        (self.spec.run_dir / RESULT).unlink(missing_ok=True)
        owner = self.spec.run_dir.name
        if not ray.get(self._switchboard.open.remote(self._name, owner)):
            raise StopRequested
        self._thread.start()

    def next(self, timeout_s: float = 1.0) -> Report | Note | Ended | None:
        """See `Job`."""
        if not self._pending:
            over = not self._thread.is_alive()
            events, stopping = ray.get(self._switchboard.take.remote(self._name, timeout_s))
            if stopping:
                raise StopRequested
            for event in events:
                self._pending += self._heard(event)
            if any("ended" in event for event in events):
                self._thread.join()
                over = True
            if not self._pending and over:
                self.stop()
                return Ended(self._failure())
        return self._pending.pop(0) if self._pending else None

    def wind_down(self, grace_s: float) -> None:
        """See `Job`.

        Returns early where there is nothing to save, which every worker that lives has to say: one
        that does not answer at once may be in the middle of a checkpoint. `stop` is still to be
        called.
        """
        deadline = time.monotonic() + grace_s
        while self._thread.is_alive() and time.monotonic() < deadline:
            workers = ray.get(self._switchboard.end.remote(self._name)).workers
            answers, silent = _ask(workers, ask_to_stop)
            if not silent and not any(answers):
                return
            self._thread.join(timeout=0.5)

    def stop(self) -> None:
        """End the workers wherever they are; returns when they and their reservation are gone."""
        if self._thread.ident is None:
            return
        deadline = time.monotonic() + REGISTER_TIMEOUT_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            # A controller that is only just starting cannot be stopped yet.
            if ray.get(self._switchboard.group.remote(self._name)).controller is not None:
                break
            time.sleep(0.1)
        end_group(self._name, self._switchboard)
        self._thread.join(timeout=10)

    def _heard(self, event: dict[str, Any]) -> list[Report | Note]:
        if "report" in event:
            return [Report.of(event["report"])]
        if "workers" in event:
            self._hang, self._silent = None, set()
            size = event["workers"]
            return [Note(f"training on {size} worker{'s' * (size != 1)}")]
        if "note" in event:
            return [Note(event["note"])]
        if "hang" in event:
            self._silent.add(event["hang"].rank)
            if self._hang is None:
                self._hang = self._ask_who_hangs(event["hang"])
                return [Note(f"{self._hang}; stacks are in {HANG_LOG}")]
        if "awake" in event:
            self._silent.discard(event["awake"])
            if not self._silent:  # a false alarm, and not why the run fails later on
                self._hang = None
        return []

    def _ask_who_hangs(self, first: Standing) -> str:
        """Every rank's stack goes to `hang.log`; the line that says who is behind."""
        workers = ray.get(self._switchboard.group.remote(self._name)).workers
        heard, _ = _ask(workers, standing)
        answers = {each.rank: each for each in heard if each is not None}
        told = list({**answers, first.rank: first}.values())
        timeout_s = self.spec.config.parallel.hang_timeout_s
        append_hang_log(self.spec.run_dir, log_text(told, len(workers), timeout_s))
        return summary(told, len(workers), timeout_s)

    def _failure(self) -> RaytuneFtError | None:
        if self._error is None:
            return None
        if self._hang is not None:
            return RunFailed(f"{self._hang}; stacks are in {HANG_LOG}")
        return failure_of(self._error)

    def _fit(self) -> None:
        try:
            train_group(self.spec, self._name, self._switchboard, self._worker, self._more)
        except (TrainingFailedError, RayError, RuntimeError, OSError, ValueError) as error:
            self._error = error
        finally:
            with contextlib.suppress(RayError):
                self._switchboard.post.remote(self._name, {"ended": True})


def _ask(workers: list[Any], question: Callable[[], Any]) -> tuple[list[Any], int]:
    """What the main threads of these workers answer, and how many neither do nor are dead."""
    asked = [worker.execute.remote(question) for worker in workers]
    if not asked:
        return [], 0
    ready, silent = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)
    answers = []
    for each in ready:
        with contextlib.suppress(RayError):
            answers.append(ray.get(each))
    return answers, len(silent)


def fit(
    spec: RunSpec,
    on_evaluation: OnEvaluation | None = None,
    tell: Callable[[str], None] | None = None,
) -> RunResult:
    """Train `spec` on a group of Ray Train workers, from its newest checkpoint if there is one.

    A worker that is lost or hangs is replaced, together with its group, up to
    `parallel.max_failures` times; an elastic group goes on with those that are left. `tell` hears
    of that. SIGINT and SIGTERM make a checkpoint first, within `stop_grace_s`; a second one does
    not wait for it. A run that failed by itself (a loss that is not finite, for one) is not tried
    again: its status is "failed" and the result says why.

    Raises:
        InputError: the cluster cannot hold the fewest workers, or they found the input to be wrong.
        RunFailed: the workers died for good; `result.json` says so too.
        Interrupted: SIGINT or SIGTERM; the workers are gone and the run can be resumed.
    """
    grace_s = stop_grace_s()
    with connected():
        require_capacity(spec.config.parallel)
        job = TrainJob(spec, start_switchboard(slots=1), train_worker)
        with interruptible() as interrupted:
            ended = None
            try:
                job.start()
                ended = _listen(job, on_evaluation, tell or _nobody, interrupted)
                if ended is None:
                    job.wind_down(grace_s)
            except (KeyboardInterrupt, SystemExit):
                if not interrupted.is_set():
                    raise  # else the second signal, which does not wait
            finally:
                try:
                    job.stop()
                finally:  # whatever comes while the workers go
                    stopped = interrupted.is_set() and ended is None
                    if stopped and load_result(spec.run_dir) is None:
                        write_ended(spec, "interrupted")
    result = read_result(spec, ended.error if ended else None)
    if result.status == "interrupted":
        raise Interrupted(f"{spec.run_dir} was interrupted; continue it with --resume")
    return result


def _nobody(line: str) -> None:
    """Hears nothing."""


def _listen(
    job: TrainJob,
    on_evaluation: OnEvaluation | None,
    tell: Callable[[str], None],
    interrupted: threading.Event,
) -> Ended | None:
    while not interrupted.is_set():
        event = job.next(timeout_s=0.5)
        if isinstance(event, Ended):
            return event
        if isinstance(event, Report) and on_evaluation is not None:
            on_evaluation(event.metrics, event.checkpoint)
        if isinstance(event, Note):
            tell(event.text)
    return None
