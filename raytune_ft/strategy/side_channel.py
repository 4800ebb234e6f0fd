"""Messages between ranks beside those of the training, such as while a checkpoint is written."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from raytune_ft.errors import CheckpointError, RunFailed

T = TypeVar("T")


class SideChannel(Protocol):
    """A channel between the ranks that the training does not use."""

    rank: int
    world_size: int
    waiting: bool
    """Whether this rank waits for others that have not answered yet."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""


class Alone:
    """The channel of a single process."""

    rank, world_size, waiting = 0, 1, False

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Group:
    """A gloo group of its own, since two threads must not share a group."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # Writing a checkpoint takes as long as the storage needs; the watchdog finds hangs.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.waiting = False

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        self.waiting = True
        try:
            dist.all_gather_object(values, value, group=self._group)
        finally:
            self.waiting = False
        return values


def on_all_ranks(
    line: SideChannel, act: Callable[[], T], failed: type[RunFailed] = CheckpointError
) -> list[T]:
    """Call `act` on every rank at once and return the results of all ranks.

    Raises:
        CheckpointError, or `failed`: it failed on some rank; every rank raises, so that none waits
            for another.
    """
    value: T | None = None
    failure: str | None = None
    try:
        value = act()
    except Exception as error:  # noqa: BLE001 - the other ranks must fail too
        named = isinstance(error, failed | OSError)
        failure = str(error) if named else f"{type(error).__name__}: {error}"
    answers = line.gather((value, failure))
    for _, text in answers:
        if text is not None:
            raise failed(text)
    return [found for found, _ in answers]
