"""Signs of life of a process that trains, and what to do when they stop.

A hang has no error: a collective waits for a rank that never comes, a file system does not
answer, a driver call does not return. So every micro-batch leaves a beat, a thread beside the
training looks at it, and a process without one for too long says where it stands and ends itself.
The group's other ranks hang with it, and whoever started the group starts it again.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from raytune_ft.layout import HANG_LOG, RESULT
from raytune_ft.train.result import write_ended
from raytune_ft.train.spec import RunSpec

HUNG_EXIT_CODE = 1
NATIVE_GRACE_S = 20.0
"""What is left to a watching thread before the last resort, which asks Python nothing."""
STDERR = 2

Beat = Callable[[float, int], None]
"""Told `done` and `of`; half of a micro-batch is done after its forward."""


@dataclass(frozen=True)
class Standing:
    """Where a process was, and since when.

    `phases` counts what was begun; `done` of `of` micro-batches of the last one are finished, half
    of one after its forward.
    """

    rank: int
    phases: int
    phase: str
    done: float
    of: int
    silent_s: float
    stacks: str

    def place(self) -> str:
        """For people: `step 12, backward of micro-batch 1 of 4`."""
        if not self.of:
            return self.phase
        if self.done >= self.of:
            return f"{self.phase}, after its {self.of} micro-batches"
        part = "backward" if self.done % 1 else "forward"
        return f"{self.phase}, {part} of micro-batch {int(self.done) + 1} of {self.of}"

    def order(self) -> tuple[int, float]:
        """Smaller is further behind. Ranks may have different numbers of micro-batches."""
        return self.phases, self.done - self.of if self.of else -math.inf


class Heartbeat:
    """Written by the thread that trains, read by any other."""

    def __init__(self) -> None:
        self.rank = 0
        self.watched = False
        self._phases, self._phase, self._done, self._of = 0, "start", 0.0, 0
        self._at, self._thread = time.monotonic(), threading.get_ident()

    def enter(self, phase: str) -> None:
        """Something new begins."""
        self._thread = threading.get_ident()
        self._phases, self._phase, self._done, self._of = self._phases + 1, phase, 0.0, 0
        self._at = time.monotonic()

    def beat(self, done: float, of: int) -> None:
        """`done` of `of` micro-batches of this phase are finished."""
        self._done, self._of = done, of
        self._at = time.monotonic()

    def alive(self) -> None:
        """Something still goes on, though nothing was finished."""
        self._at = time.monotonic()

    @property
    def at(self) -> float:
        """The time of the last beat."""
        return self._at

    def standing(self) -> Standing:
        """Where this process is, with the stack of each of its threads."""
        silent_s = time.monotonic() - self._at
        return Standing(
            self.rank,
            self._phases,
            self._phase,
            self._done,
            self._of,
            silent_s,
            stacks(self._thread),
        )


def unheard(done: float, of: int) -> None:
    """A beat that nobody listens to."""


@contextmanager
def watched(
    heart: Heartbeat, rank: int, timeout_s: float, on_hang: Callable[[Standing], None]
) -> Iterator[None]:
    """As long as the context lasts, `timeout_s` without a beat ends this process.

    `on_hang` runs first, in a thread of its own. Where not even that thread can run, since native
    code holds the interpreter or the process was stopped, the stacks go to stderr without Python.
    A beat that comes while `on_hang` runs saves the process. A pause of the whole process, as by
    SIGSTOP, is no hang; but a long one ends where it outlasts the last resort, see `disarm`.
    """
    heart.rank = rank
    heart.enter("start")
    heart.watched = True
    over = threading.Event()

    def watch() -> None:
        while True:
            before = time.monotonic()
            if over.wait(min(timeout_s / 10, 5.0)):
                return
            if time.monotonic() - before > timeout_s / 2:
                heart.alive()  # this thread stood still as well
            seen = heart.at
            left = seen + timeout_s - time.monotonic()
            _last_resort(left)
            if left > 0:
                continue
            on_hang(heart.standing())
            if heart.at == seen and not over.is_set():
                sys.stderr.flush()
                os._exit(HUNG_EXIT_CODE)

    _last_resort(timeout_s)
    thread = threading.Thread(target=watch, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        heart.watched = False
        thread.join(timeout=1.0)
        disarm()


def disarm() -> None:
    """No last resort until the watching thread looks again, which may be after a long pause."""
    faulthandler.cancel_dump_traceback_later()


def _last_resort(left_s: float) -> None:
    """A thread outside Python, which the next call of this replaces."""
    faulthandler.dump_traceback_later(max(left_s, 0.0) + NATIVE_GRACE_S, exit=True, file=STDERR)


def stacks(first: int) -> str:
    """The stack of every other thread, the innermost call last; the `first` one before others."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    mine = threading.get_ident()
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for ident, frame in sorted(sys._current_frames().items(), key=lambda one: one[0] != first)
        if ident != mine
    )


def summary(answers: Sequence[Standing], world_size: int, timeout_s: float) -> str:
    """One line: which ranks are behind, where they stand, and who does not answer at all."""
    missing = sorted(set(range(world_size)) - {each.rank for each in answers})
    parts = [f"no progress for {timeout_s:g} s"]
    if missing:
        parts.append(f"{_ranks(missing)} did not answer (stopped, or stuck outside Python)")
    front = max((each.order() for each in answers), default=None)
    behind = [each for each in answers if each.order() != front]
    for each in sorted(behind, key=Standing.order):
        parts.append(f"rank {each.rank} is behind, at {each.place()}")
    ahead = [each for each in answers if each.order() == front]
    if ahead:
        parts.append(f"{_ranks([each.rank for each in ahead])} at {ahead[0].place()}")
    return "; ".join(parts)


def log_text(answers: Sequence[Standing], world_size: int, timeout_s: float) -> str:
    """An entry of the hang log: the summary, then the stacks, those that are behind first."""
    head = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {summary(answers, world_size, timeout_s)}\n"
    entries = [
        f"\nrank {each.rank} at {each.place()}, silent for {each.silent_s:.1f} s\n{each.stacks}\n"
        for each in sorted(answers, key=Standing.order)
    ]
    return head + "".join(entries) + "\n"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


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
