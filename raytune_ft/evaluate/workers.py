"""Where models are loaded and measured, and their data tokenised: here, or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.data.processes import LocalProcesses, Made
from raytune_ft.data.tokenise import Work
from raytune_ft.records import Tell

if TYPE_CHECKING:
    from raytune_ft.strategy import Strategy

T = TypeVar("T")
A = TypeVar("A")
Measure = Callable[[A, "Strategy"], T]
"""Called in all processes that measure a model together, over which it lies as the strategy says.
The result is that of rank 0."""


class Workers(Protocol):
    """Calls functions whose arguments and results go to another process and back.

    `alone` and `each` raise RunFailed where a process was lost, and what the function raises.
    """

    def alone(
        self,
        function: Callable[..., T],
        *arguments: Any,
        tell: Tell,
        measure: Measure[Any, Any] | None = None,
    ) -> T:
        """`function(*arguments, tell=tell)` in one process. With `measure` the function gets that
        too, as a function of one argument.
        """

    def each(self, measure: Measure[A, T], arguments: Sequence[A]) -> list[T]:
        """The results of `measure` for the arguments, in order."""

    def tokenise(self, work: Work, numbers: Sequence[int], tell: Tell) -> Made:
        """Makes parts of the tokens, see `data.processes.Workers`."""


@dataclass(frozen=True)
class ThisProcess:
    """One call after another, here, on the device that `parallel` allows."""

    parallel: ParallelConfig

    def alone(
        self,
        function: Callable[..., T],
        *arguments: Any,
        tell: Tell,
        measure: Measure[Any, Any] | None = None,
    ) -> T:
        if measure is None:
            return function(*arguments, tell=tell)
        strategy = whole(self.parallel)
        return function(*arguments, tell=tell, measure=lambda one: measure(one, strategy))

    def each(self, measure: Measure[A, T], arguments: Sequence[A]) -> list[T]:
        return [measure(argument, whole(self.parallel)) for argument in arguments]

    def tokenise(self, work: Work, numbers: Sequence[int], tell: Tell) -> Made:
        """In processes of this machine."""
        return LocalProcesses()(work, numbers, tell)


HERE = ThisProcess(ParallelConfig())


def whole(parallel: ParallelConfig | None = None) -> Strategy:
    """The strategy of one process; precision does not matter, since models keep their dtype."""
    from raytune_ft.strategy.single import Single

    return Single(parallel or ParallelConfig(), "float32")
