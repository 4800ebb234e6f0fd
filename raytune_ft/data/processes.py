"""What makes parts on one machine: this process, or several where there is much text.

A process that dies costs the part that it was making, which another one makes again.
"""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from typing import Protocol

import psutil

from raytune_ft import child
from raytune_ft.config.data import DataConfig, source_configs
from raytune_ft.data.sources import local_bytes
from raytune_ft.data.tokenise import Work, make_part
from raytune_ft.errors import DataError, RunFailed
from raytune_ft.records import Tell

Made = Generator[tuple[int, Exception | None], None, None]
"""(number of a part, why it could not be made), as they are done, in any order."""

WORTH_BYTES = 8 * 2**20
"""Text that takes longer than the start of processes, which imports transformers once."""
PROCESS_BYTES = 2**30
"""Memory that a process may take."""
NO_THREADS = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Keeps numpy, an allocator of pyarrow's and tokenizers from starting threads."""
DEATHS = 3
"""A part is given up once this many processes have died while they made it."""


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


@dataclass(frozen=True)
class LocalProcesses:
    """Makes parts in processes of this machine.

    Attributes:
        count: of the processes; by default what `processes_for` says.
        server: what forks them, if it has been started ahead.
    """

    count: int | None = None
    server: Server | None = None

    def __call__(self, work: Work, numbers: Sequence[int], tell: Tell) -> Made:
        """Raises RunFailed where processes die again and again over one part."""
        count = min(self.count or processes_for(work.text_bytes(numbers)), len(numbers))
        if count <= 1:
            yield from in_this_process(work, numbers, tell)
            return
        tell(f"data: {len(numbers)} parts in {count} processes")
        with ExitStack() as stack:
            server = self.server or stack.enter_context(closing(Server()))
            pool = stack.enter_context(closing(_Pool(work, deque(numbers), count, server)))
            yield from pool.made()


def processes_for(text_bytes: int) -> int:
    """How many processes make parts of that much text: as many as this machine has CPUs and memory
    for, or only this one, at most 1, where there is little text.
    """
    if text_bytes < WORTH_BYTES:
        return 1
    return min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // PROCESS_BYTES)


@contextmanager
def started_ahead(data: DataConfig, count: int | None = None) -> Iterator[LocalProcesses]:
    """Processes that start while this one still imports what the rest of a command needs, where
    local files have much text; `count` is that of `LocalProcesses`.
    """
    sources = source_configs(data).values()
    several = (count or processes_for(sum(map(local_bytes, sources)))) > 1
    with ExitStack() as stack:
        server = stack.enter_context(closing(Server())) if several else None
        yield LocalProcesses(count, server)


class Server:
    """A process of a single thread that has imported what parts need, and forks those that make
    them: imports and the tokenizer cost their time once, and may do so before there is any work.
    """

    def __init__(self) -> None:
        self._work: Work | None = None
        self._start()

    def _start(self) -> None:
        self.process, self._channel = child.start(
            "raytune_ft.data.worker", environment=os.environ | NO_THREADS
        )
        if self._work is not None:
            self._channel.send(("work", self._work))

    def give(self, work: Work) -> None:
        """What processes forked from now on make parts of."""
        self._work = work
        with suppress(OSError):  # it has died; a fork starts another
            self._channel.send(("work", work))

    def fork(self) -> tuple[int, Connection]:
        """(the number of a new process, its channel). Raises RunFailed if it keeps dying."""
        for _ in range(DEATHS):
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    self._channel.send(("fork",))
                    send_handle(self._channel, theirs.fileno(), self.process.pid)
                    return self._channel.recv(), Connection(ours.detach())
                except (EOFError, OSError):
                    ours.close()
                    self.close()
                    self._start()
        raise RunFailed(
            f"the process that starts those which tokenise died {DEATHS} times; what it printed "
            "says why"
        )

    def end(self, pid: int) -> int | None:
        """The exit code of a process, which is killed if it is alive; None where the server that
        forked it is gone, with which it ends.
        """
        try:
            self._channel.send(("end", pid))
            code: int | None = self._channel.recv()
        except (EOFError, OSError):
            return None
        return code

    def close(self) -> None:
        """End the server."""
        self._channel.close()
        self.process.kill()
        self.process.wait()


@dataclass(eq=False)
class _Process:
    """One process, and the part that it is making."""

    pid: int
    channel: Connection
    number: int | None = None

    def give(self, number: int) -> None:
        self.number = number
        self.channel.send(number)


@dataclass
class _Pool:
    work: Work
    waiting: deque[int]
    count: int
    server: Server
    deaths: Counter[int] = field(default_factory=Counter)
    running: list[_Process] = field(default_factory=list)

    def made(self) -> Made:
        left = len(self.waiting)
        self.server.give(self.work)
        idle = deque(self._started() for _ in range(self.count))
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

    def _started(self) -> _Process:
        self.running.append(_Process(*self.server.fork()))
        return self.running[-1]

    def _replaced(self, process: _Process) -> _Process:
        number, code = process.number, self._end(process)
        assert number is not None
        self.deaths[number] += 1
        if self.deaths[number] >= DEATHS:
            why = "killed" if code is None else f"exit code {code}"
            why = signal.Signals(-code).name if code is not None and code < 0 else why
            label = self.work.sources[self.work.pieces[number][0]][0].label
            raise RunFailed(
                f"{label}: {DEATHS} processes died while they made part {number} ({why}); give "
                "them more memory, or start again: the other parts are kept"
            )
        self.waiting.appendleft(number)
        return self._started()

    def _end(self, process: _Process) -> int | None:
        self.running.remove(process)
        process.channel.close()
        return self.server.end(process.pid)

    def close(self) -> None:
        for process in list(self.running):
            self._end(process)
