"""Run a function in several gloo processes on this machine."""

from __future__ import annotations

import atexit
import gc
import multiprocessing as mp
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from tests.support.ports import free_port

# A server imports what takes seconds once, and forks every rank.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.packed", "raytune_ft.strategy.fsdp"])


def run_distributed(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """`function(*arguments)` on `world_size` ranks of one process group; raises what they raise.

    The processes are kept for the next call, since what a function imports beside that often takes
    them longer than the function does.
    """
    _kept.run(function, world_size, arguments)


def run_in_new_processes(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """The same for DeepSpeed, which remembers the groups of its process."""
    processes = _Processes()
    try:
        processes.run(function, world_size, arguments)
    finally:
        processes.end()


class _Processes:
    """As many as the largest group so far; all are killed when one of them fails."""

    def __init__(self) -> None:
        self._running: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., None], world_size: int, arguments: Any) -> None:
        while len(self._running) < world_size:
            self._start()
        address = world_size, free_port()
        waiting = {}
        for rank, (process, line) in enumerate(self._running[:world_size]):
            line.send((rank, *address, function, arguments))
            waiting[line] = process
        failures: list[str] = []
        while waiting:
            # After a failure, others fail as well or wait for ever.
            answered = wait(list(waiting), timeout=1.0 if failures else None)
            failures += [_answer(line, waiting.pop(line)) for line in answered]
            failures = [failure for failure in failures if failure]
            if failures and not answered:
                break
        if failures:
            self.end()
            raise RuntimeError("\n".join(failures))

    def _start(self) -> None:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._running.append((process, ours))

    def end(self) -> None:
        for process, line in self._running:
            process.kill()
            process.join()
            line.close()
        self._running = []


_kept = _Processes()


def end_processes() -> None:
    """Those that were kept; the next call starts new ones."""
    _kept.end()


atexit.register(end_processes)


def _answer(line: Any, process: Any) -> str:
    """What went wrong, if anything did."""
    try:
        answer: str = line.recv()
    except EOFError:
        process.join()
        return f"a process ended with exit code {process.exitcode}"
    return answer


def _serve(line: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        rank, world_size, port, function, arguments = line.recv()
        gc.freeze()  # what it imported stays
        try:
            _in_group(rank, world_size, port, function, arguments)
        except BaseException:  # noqa: BLE001 - whatever it is, the test is to show it
            line.send(f"rank {rank}:\n{traceback.format_exc()}")
        else:
            line.send("")


def _in_group(
    rank: int, world_size: int, port: int, function: Callable[..., None], arguments: Any
) -> None:
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
