"""Whoever started a process of a run: it asks the process to stop, and hears when it hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from raytune_ft.rundir import RESULT
from raytune_ft.train.ended import write_ended
from raytune_ft.train.signals import interruptible
from raytune_ft.train.spec import RunSpec
from raytune_ft.train.watchdog import Heartbeat, Standing, disarm, log_text, summary

HANG_LOG = "hang.log"


@dataclass(frozen=True)
class Host:
    """`on_hang` may take a while; the process ends after it."""

    should_stop: Callable[[], bool] = lambda: False
    on_hang: Callable[[Standing], None] = lambda standing: None
    heart: Heartbeat = field(default_factory=Heartbeat)


@contextmanager
def own_host(spec: RunSpec) -> Iterator[Host]:
    """For a process that nobody watches: signals stop it, and a hang fails the run.

    Nobody would start it again; `--resume` does, from the last checkpoint. Ctrl-Z is no hang.
    """
    heart = Heartbeat()

    def fail(standing: Standing) -> None:
        seen = heart.at
        timeout_s = spec.config.parallel.hang_timeout_s
        line = summary([standing], 1, timeout_s)
        text = log_text([standing], 1, timeout_s)
        print(text, file=sys.stderr, flush=True)
        append_hang_log(spec.run_dir, text)
        write_ended(spec, "failed", f"RunFailed: {line}; see {HANG_LOG}")
        if heart.at != seen:
            (spec.run_dir / RESULT).unlink(missing_ok=True)  # it goes on after all

    with interruptible() as stop, _suspendable():
        yield Host(stop.is_set, fail, heart)


@contextmanager
def _suspendable() -> Iterator[None]:
    """SIGTSTP still stops this process, which may then sleep for as long as it likes."""
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


def append_hang_log(run_dir: Path, text: str) -> None:
    """`hang.log` of a run: one entry for each time that its processes hung."""
    with (run_dir / HANG_LOG).open("a", encoding="utf-8") as file:
        file.write(text)
