"""What makes parts on one machine: this process, or several where there is much text.

A process that dies costs the part that it was making, which another one makes again.
"""

from __future__ import annotations

import os
import signal
from collections import Counter, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Protocol

import psutil

from raytune_ft import child
from raytune_ft.data.tokenise import Work, make_part
from raytune_ft.errors import DataError, RunFailed
from raytune_ft.records import Tell

Made = Generator[tuple[int, Exception | None], None, None]
"""(number of a part, why it could not be made), as they are done, in any order."""

WORTH_BYTES = 16 * 2**20
"""Text that takes longer than the start of a process, which imports transformers."""
PROCESS_BYTES = 2**30
"""Memory that a process may take."""
DEATHS = 3
"""So many processes may die over one part."""


class Workers(Protocol):
    """Makes the parts of these numbers."""

    def __call__(self, work: Work, numbers: Sequence[int], tell: Tell) -> Made:
        """No part behind one that failed needs to be made."""


def in_this_process(work: Work, numbers: Sequence[int], tell: Tell) -> Made:
    """One after another."""
    for number in numbers:
        yield number, attempt(work, number)


def attempt(work: Work, number: int) -> Exception | None:
    """Make a part; what the caller is to raise where the input is at fault."""
    try:
        make_part(work, number)
    except (DataError, OSError) as error:
        return error
    return None


def in_processes(work: Work, numbers: Sequence[int], tell: Tell, count: int | None = None) -> Made:
    """In `count` processes; by default as many as there are CPUs and memory for, and none but this
    one where there is little text.

    Raises:
        RunFailed: processes die again and again over one part.
    """
    if count is None:
        pieces = work.pieces
        worth = sum(pieces[number][1].bytes for number in numbers) >= WORTH_BYTES
        room = psutil.virtual_memory().available // PROCESS_BYTES
        count = min(len(os.sched_getaffinity(0)), room) if worth else 1
    count = min(count, len(numbers))
    if count <= 1:
        yield from in_this_process(work, numbers, tell)
        return
    pool = _Pool(work, deque(numbers), count)
    tell(f"data: {len(numbers)} parts in {count} processes")
    try:
        yield from pool.made()
    finally:
        pool.close()


class _Process:
    """One process, and the part that it is making."""

    def __init__(self, work: Work) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self.process, self.channel = child.start("raytune_ft.data.worker", environment=environment)
        self.number: int | None = None
        self._work: Work | None = work

    def give(self, number: int) -> None:
        self.number = number
        if self._work is not None:  # the first part; by now all processes have been started
            self.channel.send(self._work)
            self._work = None
        self.channel.send(number)

    def end(self) -> int:
        """Its exit code."""
        self.channel.close()
        self.process.kill()
        return self.process.wait()


@dataclass
class _Pool:
    work: Work
    waiting: deque[int]
    count: int
    deaths: Counter[int] = field(default_factory=Counter)
    running: list[_Process] = field(default_factory=list)
    failed: int | None = None

    def made(self) -> Made:
        left = len(self.waiting)
        self.running = [_Process(self.work) for _ in range(self.count)]
        idle = deque(self.running)
        while left:
            while idle and self.waiting:
                process, number = idle.popleft(), self.waiting.popleft()
                try:
                    process.give(number)
                except OSError:  # it has died
                    idle.append(self._replaced(process))
            for channel in wait([one.channel for one in self.running if one.number is not None]):
                process = next(one for one in self.running if one.channel is channel)
                try:
                    number, error = process.channel.recv()
                except (EOFError, OSError):
                    idle.append(self._replaced(process))
                    continue
                process.number = None
                idle.append(process)
                left -= 1
                if error is not None:  # what comes behind it is not needed
                    behind = [one for one in self.waiting if one > number]
                    self.waiting = deque(one for one in self.waiting if one < number)
                    left -= len(behind)
                yield number, error

    def _replaced(self, process: _Process) -> _Process:
        code, number = process.end(), process.number
        self.running.remove(process)
        assert number is not None
        self.deaths[number] += 1
        if self.deaths[number] >= DEATHS:
            why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            label = self.work.sources[self.work.pieces[number][0]][0].label
            raise RunFailed(
                f"{label}: {DEATHS} processes died while they made part {number} ({why}); give "
                "them more memory, or start again: the other parts are kept"
            )
        self.waiting.appendleft(number)
        self.running.append(_Process(self.work))
        return self.running[-1]

    def close(self) -> None:
        for process in self.running:
            process.end()
