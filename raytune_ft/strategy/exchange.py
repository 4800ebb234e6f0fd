"""What the ranks tell each other beside the training, from a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from raytune_ft.errors import CheckpointError

T = TypeVar("T")


class Exchange(Protocol):
    """A line between the ranks that the training does not use."""

    rank: int
    world_size: int
    waiting: bool
    """For other ranks, which have not answered yet."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""


class Alone:
    """One process has nobody to talk to."""

    rank, world_size, waiting = 0, 1, False

    def gather(self, value: Any) -> list[Any]:
        """See `Exchange.gather`."""
        return [value]


class Group:
    """A gloo group beside the training's, since two threads must not share one."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # A checkpoint takes as long as the storage does; hangs are found by the heartbeat.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.waiting = False

    def gather(self, value: Any) -> list[Any]:
        """See `Exchange.gather`."""
        values: list[Any] = [None] * self.world_size
        self.waiting = True
        try:
            dist.all_gather_object(values, value, group=self._group)
        finally:
            self.waiting = False
        return values


def together(line: Exchange, act: Callable[[], T]) -> list[T]:
    """`act` on every rank at once; what each returned, on every rank.

    Raises:
        CheckpointError: it failed on some rank; every rank raises, so that none waits for another.
    """
    value: T | None = None
    failure: str | None = None
    try:
        value = act()
    except Exception as error:  # noqa: BLE001 - whatever it is, the others must hear of it
        named = isinstance(error, CheckpointError | OSError)
        failure = str(error) if named else f"{type(error).__name__}: {error}"
    answers = line.gather((value, failure))
    for _, text in answers:
        if text is not None:
            raise CheckpointError(text)
    return [found for found, _ in answers]
