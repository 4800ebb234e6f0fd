"""The watchdog of a process that trains: it finds a hang, reports it and ends the process.

A hang raises no error: a collective waits for a rank that never comes, a file system does not
answer, a driver call does not return. So every micro-batch leaves a beat. A thread beside the
training checks it; after `parallel.hang_timeout_s` without a beat it reports the phase, all stacks
and the collectives that have not ended, and ends the process. The other ranks hang too, and the
group is started again.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raytune_ft.layout import HANG_LOG

HUNG_EXIT_CODE = 1
NATIVE_GRACE_S = 20.0
"""Time for the watching thread to report, before faulthandler ends the process without Python."""
STDERR = 2
AUTO_S, AUTO_LEAST_S = 1800.0, 300.0
"""`parallel.hang_timeout_s: auto`, until enough is seen, and at least."""
SEEN, TIMES = 3, 20
"""After this many steps or evaluations, auto is this many times the longest silence in them."""
RECORDER_S = 2.0
"""How long the flight recorder may take: it asks the driver of a GPU, which may hang as well."""
RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""torch's, of NCCL and of gloo; a build for CPUs has the second alone."""
SHOWN = 20
"""Collectives in a report, at most."""

Beat = Callable[[float, int], None]
"""Called with `done` and `of` micro-batches; after its forward, half of one is done."""


@dataclass(frozen=True)
class Standing:
    """Where a process stands, and for how long.

    `phases` counts the phases begun; `done` of `of` micro-batches of the current one are finished.
    It hangs when it has been silent for `limit_s`.
    """

    rank: int
    phases: int
    phase: str
    done: float
    of: int
    silent_s: float
    limit_s: float
    stacks: str

    def place(self) -> str:
        """The place in words: `step 12, backward of micro-batch 1 of 4`."""
        if not self.of:
            return self.phase
        if self.done >= self.of:
            return f"{self.phase}, after its {self.of} micro-batches"
        part = "backward" if self.done % 1 else "forward"
        return f"{self.phase}, {part} of micro-batch {int(self.done) + 1} of {self.of}"

    def order(self) -> tuple[int, float]:
        """A sort key: smaller is further behind, also where ranks have different micro-batches."""
        return self.phases, self.done - self.of if self.of else -math.inf


class Heartbeat:
    """The phase and last beat of a process; written by the training thread, read by any other."""

    def __init__(self) -> None:
        self.rank = 0
        self.watched = False
        self.timeout_s: float | Literal["auto"] = "auto"
        self._phases, self._phase, self._done, self._of = 0, "start", 0.0, 0
        self._seen, self._longest_s = 0, 0.0
        self._at, self._thread = time.monotonic(), threading.get_ident()

    def begin(self, rank: int, timeout_s: float | Literal["auto"]) -> None:
        """Begin a run: what was seen of the one before says nothing of its steps."""
        self.rank, self.timeout_s = rank, timeout_s
        self.enter("start")
        self._seen, self._longest_s = 0, 0.0
        self.watched = True

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        self._note_silence()
        self._seen += 0 < self._of <= self._done
        self._thread = threading.get_ident()
        self._phases, self._phase, self._done, self._of = self._phases + 1, phase, 0.0, 0

    def beat(self, done: float, of: int) -> None:
        """Note that `done` of `of` micro-batches of this phase are finished."""
        self._note_silence()
        self._done, self._of = done, of

    def alive(self) -> None:
        """Note that the process works, though it finished no micro-batch."""
        self._at = time.monotonic()

    def _note_silence(self) -> None:
        now = time.monotonic()
        if self._of:  # in a step or an evaluation, not while a model is loaded
            self._longest_s = max(self._longest_s, now - self._at)
        self._at = now

    @property
    def limit_s(self) -> float:
        """How long a silence is a hang: what is written, or what follows from the steps seen."""
        if self.timeout_s != "auto":
            return self.timeout_s
        if self._seen < SEEN:
            return AUTO_S
        return min(AUTO_S, max(AUTO_LEAST_S, TIMES * self._longest_s))

    @property
    def at(self) -> float:
        """The time of the last beat, by `time.monotonic`."""
        return self._at

    def standing(self) -> Standing:
        """Where this process is, with the stack of each of its threads and its collectives."""
        silent_s = time.monotonic() - self._at
        return Standing(
            self.rank,
            self._phases,
            self._phase,
            self._done,
            self._of,
            silent_s,
            self.limit_s,
            "\n".join(filter(None, (stacks(self._thread), collectives()))),
        )


def no_beat(done: float, of: int) -> None:
    """A `Beat` that does nothing."""


@contextmanager
def watched(
    heart: Heartbeat,
    rank: int,
    timeout_s: float | Literal["auto"],
    on_hang: Callable[[Standing], None],
) -> Iterator[None]:
    """In the context, `timeout_s` without a beat ends this process; auto: see `limit_s`.

    `on_hang` runs first, in its own thread. Where that thread cannot run, because native code holds
    the interpreter, faulthandler writes the stacks to stderr and ends the process. A beat while
    `on_hang` runs cancels the end. A pause of the whole process (SIGSTOP) is not a hang, unless it
    outlasts faulthandler's timer; see `disarm`.
    """
    heart.begin(rank, timeout_s)
    over = threading.Event()

    def watch() -> None:
        while True:
            before, limit_s = time.monotonic(), heart.limit_s
            if over.wait(min(limit_s / 10, 5.0)):
                return
            if time.monotonic() - before > limit_s / 2:
                heart.alive()  # this thread was paused too, so the process was
            seen = heart.at
            left = seen + heart.limit_s - time.monotonic()
            _last_resort(left)
            if left > 0:
                continue
            on_hang(heart.standing())
            if heart.at == seen and not over.is_set():
                sys.stderr.flush()
                os._exit(HUNG_EXIT_CODE)

    _last_resort(heart.limit_s)
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
    """Stop faulthandler's timer until the watching thread looks again, after a pause."""
    faulthandler.cancel_dump_traceback_later()


def _last_resort(left_s: float) -> None:
    """Start faulthandler's timer, which needs no Python; the next call restarts it."""
    faulthandler.dump_traceback_later(max(left_s, 0.0) + NATIVE_GRACE_S, exit=True, file=STDERR)


def stacks(first: int) -> str:
    """The stacks of all other threads, innermost call last; that of thread `first` comes first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    mine = threading.get_ident()
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for ident, frame in sorted(sys._current_frames().items(), key=lambda one: one[0] != first)
        if ident != mine
    )


def collectives() -> str:
    """What torch's flight recorders know: the collectives that have not ended, and the last that
    has. On a GPU every rank's stack stands in the same place, and this tells who is behind.

    Empty where no process group was used, or no recorder is on (TORCH_FR_BUFFER_SIZE=0).
    """
    entries: list[dict[str, Any]] = []

    def read() -> None:
        c10d: Any = sys.modules.get("torch._C._distributed_c10d")
        for name in RECORDERS:
            if (dump := getattr(c10d, name, None)) is not None:
                entries.extend(json.loads(dump(True, False)).get("entries", []))
        answered.set()

    answered = threading.Event()
    threading.Thread(target=read, name="flight recorder", daemon=True).start()
    if not answered.wait(RECORDER_S):
        return "collectives: the flight recorder does not answer"
    if not entries:
        return ""
    waiting = [entry for entry in entries if not _ended(entry)]
    ended = [entry for entry in entries if _ended(entry)]
    lines = [f"collectives that have not ended: {len(waiting)}, the last of them first"]
    lines += [f"  {_collective(entry)}" for entry in waiting[-SHOWN:][::-1]]
    return "\n".join([*lines, *(f"the last that has: {_collective(e)}" for e in ended[-1:])])


def _ended(entry: dict[str, Any]) -> bool:
    return bool(entry["retired"]) or entry["state"] == "completed"


def _collective(entry: dict[str, Any]) -> str:
    """`12 nccl:all_reduce BFloat16 [[4096]] of default_pg, started`."""
    types = " ".join(dict.fromkeys(entry.get("input_dtypes", [])))
    name, group = entry["profiling_name"], entry["process_group"][-1]
    number = entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"]
    return f"{number} {name} {types} {entry['input_sizes']} of {group}, {entry['state']}"


def summary(answers: Sequence[Standing], world_size: int, timeout_s: float) -> str:
    """One line: which ranks are behind, where they stand, and which do not answer."""
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
    """An entry of the hang log: the summary, then all stacks, ranks furthest behind first."""
    head = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {summary(answers, world_size, timeout_s)}\n"
    entries = [
        f"\nrank {each.rank} at {each.place()}, silent for {each.silent_s:.1f} s\n{each.stacks}\n"
        for each in sorted(answers, key=Standing.order)
    ]
    return head + "".join(entries) + "\n"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def append_hang_log(run_dir: Path, text: str) -> None:
    """Add an entry to the run's `hang.log`."""
    with (run_dir / HANG_LOG).open("a", encoding="utf-8") as file:
        file.write(text)
