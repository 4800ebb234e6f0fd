"""What the ranks tell each other beside the training, from a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from raytune_ft.errors import CheckpointError

T = TypeVar("T")


class Exchange(Protocol):
    """A line between the ranks that the training does not use."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""


class Alone:
    """One process has nobody to talk to."""

    rank, world_size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """See `Exchange.gather`."""
        return [value]


class Group:
    """A gloo group beside the training's, since two threads must not share one."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")

    def gather(self, value: Any) -> list[Any]:
        """See `Exchange.gather`."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
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
    except (CheckpointError, OSError) as error:
        failure = str(error)
    answers = line.gather((value, failure))
    for _, text in answers:
        if text is not None:
            raise CheckpointError(text)
    return [found for found, _ in answers]
