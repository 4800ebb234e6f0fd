"""How a run is asked to stop: Ctrl-C, SIGTERM, a drained node, the end of a search.

Stopping is the same request everywhere: finish the step, save a checkpoint, leave. What the first
SIGINT or SIGTERM does, by where the run trains:

- **One process** (`own_host`): the signal sets an event, which the loop's vote at the end of the
  step reads. The loop saves, the run writes "interrupted", the command exits with 130.
- **Workers** (`ray_backend.run_handle.fit`): the driver gets the signal and tells its worker group
  through the registry; each worker sets its own event, and the ranks vote, so that all stop after
  the same step. The driver waits `stop_grace_s()`, ends the group and writes "interrupted" where
  rank 0 left no result. A worker also stops when Ray drains its node or sends it SIGTERM: that is
  no end of the run, and its group starts again.
- **A sweep** (`ray_backend.sweep`): the driver tells the registry that everything stops; every
  trial asks its own run to stop as above and stays unfinished in the study, so that `--resume`
  continues it. A trial that the search prunes leaves after its step without a checkpoint.
- **Packed** (`ray_backend.packed_worker`): the engine's ranks vote between two passes; every slot
  saves its run after its last whole step.

A second signal does what it did before the first: Python and the shell end the command at once,
and the run continues from its last committed checkpoint. `train.result.end_run` says whose word
counts in `result.json`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from raytune_ft.errors import RunFailed
from raytune_ft.layout import HANG_LOG, RESULT
from raytune_ft.rundir import RunSpec
from raytune_ft.train.result import end_run, failed_result
from raytune_ft.train.watchdog import (
    Heartbeat,
    Standing,
    append_hang_log,
    disarm,
    log_text,
    summary,
)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the second one does what it did before.

    Python's own answer would break off in the middle of a step. Ray Train and Tune catch SIGINT
    alone, and only to exit with 0 or to hang on to their workers.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, frame: object) -> None:
        event.set()
        restore()

    for number in previous:
        signal.signal(number, request)
    try:
        yield event
    finally:
        restore()


@dataclass(frozen=True)
class Host:
    """The process that started this one: it may ask the run to stop, and gets a report of a hang.

    should_stop: whether to save after the step that runs, and to leave.
    should_leave: whether to leave then without a checkpoint: the search has pruned the run.
    on_hang: may take seconds; the process ends after it.
    """

    should_stop: Callable[[], bool] = lambda: False
    should_leave: Callable[[], bool] = lambda: False
    on_hang: Callable[[Standing], None] = lambda standing: None
    heart: Heartbeat = field(default_factory=Heartbeat)


@contextmanager
def own_host(spec: RunSpec, heart: Heartbeat) -> Iterator[Host]:
    """The host of a process that no other process watches: signals stop the run, a hang fails it.

    `--resume` continues it from its last checkpoint. Ctrl-Z is not a hang.
    """

    def fail(standing: Standing) -> None:
        seen = heart.at
        timeout_s = standing.limit_s
        line = summary([standing], 1, timeout_s)
        text = log_text([standing], 1, timeout_s)
        print(text, file=sys.stderr, flush=True)
        append_hang_log(spec.run_dir, text)
        end_run(spec, failed_result(spec, RunFailed(f"{line}; see {HANG_LOG}")))
        if heart.at != seen:
            (spec.run_dir / RESULT).unlink(missing_ok=True)  # the run continues after all

    with interruptible() as stop, _suspendable():
        yield Host(stop.is_set, on_hang=fail, heart=heart)


@contextmanager
def _suspendable() -> Iterator[None]:
    """SIGTSTP still stops this process; the watchdog does not count the time that it sleeps."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTSTP) is not signal.SIG_DFL:
        yield
        return

    def suspend(number: int, frame: object) -> None:
        disarm()
        os.kill(os.getpid(), signal.SIGSTOP)

    signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
