"""Where models are loaded and measured: in this process, or on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.records import Tell
from raytune_ft.strategy import Strategy
from raytune_ft.strategy.single import Single

T = TypeVar("T")
A = TypeVar("A")


class Workers(Protocol):
    """Calls functions of a module, whose arguments and results go to another process and back."""

    def alone(self, function: Callable[..., T], *arguments: Any, tell: Tell) -> T:
        """`function(*arguments, tell=tell)` in one process.

        Raises:
            RunFailed: the process was lost; anything else as `function` raises it.
        """

    def each(self, function: Callable[[A, Strategy], T], arguments: Sequence[A]) -> list[T]:
        """`function(argument, strategy)` for each argument, in order.

        `strategy` is how a model lies over the processes that measure it together. All of them call
        the function, and the result is that of rank 0.

        Raises:
            RunFailed: a process was lost; anything else as `function` raises it.
        """


class ThisProcess:
    """One call after another, here."""

    def alone(self, function: Callable[..., T], *arguments: Any, tell: Tell) -> T:
        return function(*arguments, tell=tell)

    def each(self, function: Callable[[A, Strategy], T], arguments: Sequence[A]) -> list[T]:
        return [function(argument, whole()) for argument in arguments]


HERE = ThisProcess()


def whole() -> Strategy:
    """The strategy of one process; precision does not matter, since models keep their dtype."""
    return Single(ParallelConfig(), "float32")
