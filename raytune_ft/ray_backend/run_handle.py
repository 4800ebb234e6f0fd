"""One run on a worker group: start it, receive its reports, end it, read its result."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2.api.exceptions import TrainingFailedError

from raytune_ft.config.schema import Config
from raytune_ft.errors import Interrupted, RaytuneFtError, RunFailed
from raytune_ft.format import some_of
from raytune_ft.layout import HANG_LOG, RESULT
from raytune_ft.model.quantise import quantises
from raytune_ft.ray_backend.capacity import room
from raytune_ft.ray_backend.cluster import connected, stop_grace_s
from raytune_ft.ray_backend.environment import check_environment
from raytune_ft.ray_backend.metrics import measured
from raytune_ft.ray_backend.registry import (
    Ended,
    Message,
    Note,
    Report,
    RunHandle,
    StopRequested,
    start_registry,
)
from raytune_ft.ray_backend.vllm import engines
from raytune_ft.ray_backend.worker import (
    ask_to_leave,
    ask_to_stop,
    standing,
    train_worker,
    trial_worker,
)
from raytune_ft.ray_backend.worker_group import Worker, end_group, failure_of, train_group
from raytune_ft.records import EvalMetrics, RunResult
from raytune_ft.rundir import RunSpec
from raytune_ft.train.result import end_run, left_by_workers
from raytune_ft.train.stopping import interruptible
from raytune_ft.train.watchdog import (
    Standing,
    append_hang_log,
    log_text,
    summary,
)

REGISTER_TIMEOUT_S = 30.0
LEAVE_S = 30.0
"""How long a trial that is stopped may take to end its step; then its workers are ended instead."""
IDLE_S = 15.0
"""How long workers without a trial wait for the next one. Ray Tune begins it within a second."""
ANSWER_TIMEOUT_S = 2.0
"""For a worker's main thread, which only answers such calls; training has a thread of its own."""
SHOWN_NODES = 4
OnEvaluation = Callable[[EvalMetrics, str | None], None]
Ask = Callable[[list[Any], Callable[[], Any]], tuple[list[Any], int]]


def ask_workers(workers: list[Any], question: Callable[[], Any]) -> tuple[list[Any], int]:
    """Call `question` on the main thread of each worker.

    Returns the answers of those that answer within `ANSWER_TIMEOUT_S`, and the number of those
    that neither answered nor died.
    """
    asked = [worker.execute.remote(question) for worker in workers]
    if not asked:
        return [], 0
    ready, silent = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)
    answers = []
    for each in ready:
        with contextlib.suppress(RayError):
            answers.append(ray.get(each))
    return answers, len(silent)


def shown_nodes(nodes: Sequence[str]) -> str:
    """The different nodes of a group's workers, in the order of ranks."""
    names = list(dict.fromkeys(nodes))
    return f"node{'s' * (len(names) > 1)} {some_of(names, SHOWN_NODES)}"


class GroupHandle:
    """A worker group in the background of this process; see `RunHandle`.

    Its workers run `worker`, whose payload is the run and `more`; `doing` says what that is.
    `train` blocks until the group is gone, `ask` calls a function on the workers, `end` ends the
    group.
    """

    def __init__(
        self,
        spec: RunSpec,
        registry: Any,
        worker: Worker,
        more: dict[str, Any] | None = None,
        doing: str = "training",
        train: Callable[..., None] = train_group,
        ask: Ask = ask_workers,
        end: Callable[[str, Any], None] = end_group,
    ) -> None:
        self.spec = spec
        self._worker, self._more, self._doing = worker, more or {}, doing
        self._train, self._ask, self._end_group = train, ask, end
        # Ray resumes a run whose name it knows; ours resume from their own checkpoints.
        self._name = f"{spec.run_dir.name}-{uuid.uuid4().hex[:8]}"
        self._registry = registry
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name=self._name, daemon=True)
        self._pending: list[Message | Ended] = []
        self._hang: str | None = None  # of the group that runs now
        self._silent: set[int] = set()  # its ranks that said they hang
        self._down_since: float | None = time.monotonic()

    @property
    def down_s(self) -> float:
        """For how long it has had no workers, as far as its messages were taken."""
        since = self._down_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        self._open()
        self._thread.start()

    def _open(self) -> None:
        owner = self.spec.run_dir.name
        if not ray.get(self._registry.open.remote(self._name, owner)):
            raise StopRequested

    def next(self, timeout_s: float = 1.0) -> Message | Ended | None:
        if not self._pending:
            over = not self._thread.is_alive()
            events, stopping = ray.get(self._registry.take.remote(self._name, timeout_s))
            if stopping:
                raise StopRequested
            for event in events:
                self._pending += self._messages_of(event)
            if any("ended" in event for event in events):
                self._thread.join()
                over = True
            if not self._pending and over:
                self.stop()
                return Ended(self._failure())
        return self._pending.pop(0) if self._pending else None

    def wind_down(self, grace_s: float) -> None:
        """Ask the run to save and to leave; wait for that, at most `grace_s`. `stop` must follow.

        Returns early if every living worker answers that it has nothing to save. A worker that
        does not answer at once may be writing a checkpoint, so it is waited for.
        """
        deadline = time.monotonic() + grace_s
        while self._thread.is_alive() and time.monotonic() < deadline:
            workers = ray.get(self._registry.end.remote(self._name)).workers
            answers, silent = self._ask(workers, ask_to_stop)
            if not silent and not any(answers):
                return
            self._thread.join(timeout=0.5)

    def stop(self) -> None:
        """End the workers; return when they and their placement groups are gone."""
        if self._thread.ident is None:
            return
        deadline = time.monotonic() + REGISTER_TIMEOUT_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            # A controller that is still starting cannot be stopped yet.
            if ray.get(self._registry.group.remote(self._name)).controller is not None:
                break
            time.sleep(0.1)
        self._end_group(self._name, self._registry)
        self._thread.join(timeout=10)

    def _messages_of(self, event: dict[str, Any]) -> list[Message | Ended]:
        if "report" in event:
            return [Report.of(event["report"])]
        if "value" in event:
            return [event["value"]]
        if "workers" in event:
            self._hang, self._silent = None, set()
            nodes = event["workers"]
            self._down_since = None
            size = f"{len(nodes)} worker{'s' * (len(nodes) != 1)}"
            return [Note(f"{self._doing} on {size} ({shown_nodes(nodes)})")]
        if "down" in event:
            self._down_since = time.monotonic()
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
        """Write the stack of every rank to `hang.log`; return the line that names who is behind."""
        workers = ray.get(self._registry.group.remote(self._name)).workers
        replies, _ = self._ask(workers, standing)
        answers = {each.rank: each for each in replies if each is not None}
        standings = list({**answers, first.rank: first}.values())
        timeout_s = first.limit_s
        append_hang_log(self.spec.run_dir, log_text(standings, len(workers), timeout_s))
        return summary(standings, len(workers), timeout_s)

    def _failure(self) -> RaytuneFtError | None:
        if self._error is None:
            return None
        if self._hang is not None:
            return RunFailed(f"{self._hang}; stacks are in {HANG_LOG}")
        return failure_of(self._error)

    def _fit(self) -> None:
        try:
            self._train(self.spec, self._name, self._registry, self._worker, self._more)
        except (TrainingFailedError, RayError, RuntimeError, OSError, ValueError) as error:
            self._error = error
        finally:
            with contextlib.suppress(RayError):
                self._registry.post.remote(self._name, {"ended": True})


class TrialHandle(GroupHandle):
    """A worker group that trains one trial after another; see `trial_worker`.

    It is passed on as long as it has had no fault: neither a restart nor a hang. Without a trial
    it ends by itself after `IDLE_S`, since others may wait for its place.
    """

    def __init__(self, spec: RunSpec, registry: Any, **parts: Any) -> None:
        super().__init__(spec, registry, trial_worker, **parts)
        self._number = 0
        self._sound, self._idle = True, False
        self._lock = threading.Lock()  # of its end, which the timer may begin
        self._timer: threading.Timer | None = None

    def start(self) -> None:
        if self._number:  # it has taken the trial already
            return
        self._open()
        if not self._assign(self.spec):
            ray.get(self._registry.close.remote(self._name))
            raise StopRequested
        self._thread.start()

    def take(self, spec: RunSpec) -> bool:
        """Train `spec` next; False where it needs other processes, or where these have to end."""
        events, _ = ray.get(self._registry.take.remote(self._name, 0.0))
        for event in events:  # a worker may be lost while it waits
            self._messages_of(event)
        with self._lock:
            alike = _process(spec.config) == _process(self.spec.config)
            if not (self._idle and self._sound and alike):
                return False
            self._end_timer()
            self._idle = False
            return self._assign(spec)

    def leave(self) -> bool:
        """End the run, without a checkpoint where it has not ended; whether another can follow."""
        if not self._idle and self._sound:
            workers = ray.get(self._registry.prune.remote(self._name)).workers
            self._ask(workers, partial(ask_to_leave, self._number))
            deadline = time.monotonic() + LEAVE_S * bool(workers)
            with contextlib.suppress(StopRequested):
                while time.monotonic() < deadline and not isinstance(self.next(0.5), Ended):
                    pass
        return self._idle

    def stop(self) -> None:
        with self._lock:
            self._end_timer()
            self._idle = self._sound = False
            super().stop()

    def _assign(self, spec: RunSpec) -> bool:
        number = ray.get(self._registry.assign.remote(self._name, spec.run_dir.name, spec))
        if number is None:
            return False
        self.spec, self._number = spec, number
        return True

    def _messages_of(self, event: dict[str, Any]) -> list[Message | Ended]:
        if "over" in event:
            if event["over"] != self._number:
                return []  # of workers that started again after it
            with self._lock:
                self._idle = self._sound
                if self._idle:
                    self._timer = threading.Timer(IDLE_S, self.stop)
                    self._timer.daemon = True
                    self._timer.start()
            return [Ended(None)]
        if "down" in event or "hang" in event:
            self._sound = False
        return super()._messages_of(event)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _process(config: Config) -> tuple[Any, ...]:
    """What decides where and how the processes of a run start."""
    train = config.train
    return config.parallel, config.model, train.precision, train.deterministic, quantises(config)


def fit(
    spec: RunSpec,
    on_evaluation: OnEvaluation | None = None,
    tell: Callable[[str], None] | None = None,
    worker: Worker = train_worker,
) -> RunResult:
    """Train `spec` on a group of Ray Train workers, from its newest checkpoint if there is one.

    When a worker is lost or hangs, the whole group is restarted, up to `parallel.max_failures`
    times; an elastic group restarts with the workers that are left. `tell` gets a line for each
    start. SIGINT and SIGTERM write a checkpoint first, within `stop_grace_s`; a second signal ends
    the run without waiting for it. A run that failed by itself, such as by a loss that is not
    finite, is not tried again: its status is "failed" and the result says why.

    Raises:
        InputError: the cluster cannot hold the fewest workers, also after it was waited for nodes;
            or a worker refused the input.
        RunFailed: workers died more often than allowed; `result.json` has the reason.
        Interrupted: SIGINT or SIGTERM; the workers are gone and the run can be resumed.
    """
    grace_s = stop_grace_s()
    tell = tell or (lambda line: None)
    with connected(), room(spec.config.parallel, tell, most=1), measured(spec.run_dir):
        check_environment(spec.config, tell)
        with engines(spec.config, tell) as actors:
            handle = GroupHandle(spec, start_registry(slots=1), worker, {"engines": actors})
            return run_to_end(handle, spec, grace_s, on_evaluation, tell)


def run_to_end(
    handle: RunHandle,
    spec: RunSpec,
    grace_s: float,
    on_evaluation: OnEvaluation | None,
    tell: Callable[[str], None],
) -> RunResult:
    """Start a run, pass on what it reports, and end it; see `fit`."""
    with interruptible() as interrupted:
        ended = None
        try:
            (spec.run_dir / RESULT).unlink(missing_ok=True)
            handle.start()
            ended = _listen(handle, on_evaluation, tell, interrupted)
            if ended is None:
                handle.wind_down(grace_s)
        except (KeyboardInterrupt, SystemExit):
            if not interrupted.is_set():
                raise  # else it is the second signal: end without waiting for a checkpoint
        finally:
            try:
                handle.stop()
            finally:  # also if another signal comes while the workers end
                if interrupted.is_set() and ended is None:
                    end_run(spec, "interrupted")
    result = left_by_workers(spec, ended.error if ended else None)
    if result.status == "interrupted":
        raise Interrupted.of(spec.run_dir)
    return result


def _listen(
    handle: RunHandle,
    on_evaluation: OnEvaluation | None,
    tell: Callable[[str], None],
    interrupted: threading.Event,
) -> Ended | None:
    while not interrupted.is_set():
        event = handle.next(timeout_s=0.5)
        if isinstance(event, Ended):
            return event
        if isinstance(event, Report) and on_evaluation is not None:
            on_evaluation(event.metrics, event.checkpoint)
        if isinstance(event, Note):
            tell(event.text)
    return None
