"""What a sweep has spent, and whether that is all it may. Pure: no ray, no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from raytune_ft.config.durations import duration_s
from raytune_ft.config.search import BudgetConfig

HOUR_S = 3600.0


class Spending:
    """Of all trials, by all drivers of the sweep.

    Args:
        budget: None limits nothing.
        examples: by trial, what earlier drivers trained.
        gpu_s: seconds that earlier drivers held GPUs, times their number.
        gpus: of one trial, a share of a GPU where trials share one.
        elapsed_s: the seconds of all drivers until now.
    """

    def __init__(
        self,
        budget: BudgetConfig | None,
        examples: Mapping[str, int],
        gpu_s: float,
        gpus: float,
        elapsed_s: Callable[[], float],
    ) -> None:
        self._budget = budget or BudgetConfig()
        self._examples, self._gpu_s = dict(examples), gpu_s
        self._gpus, self._elapsed_s = gpus, elapsed_s
        self._running: dict[str, float] = {}
        self._wall_s = None if self._budget.wall_s is None else duration_s(self._budget.wall_s)

    def began(self, trial: str) -> None:
        """A trial holds its workers."""
        self._running[trial] = self._elapsed_s()

    def trained(self, trial: str, examples: int) -> None:
        """A trial has seen so many examples, counted from its first driver on."""
        self._examples[trial] = max(examples, self._examples.get(trial, 0))

    def ended(self, trial: str) -> None:
        """A trial holds nothing any more."""
        if trial in self._running:
            self._gpu_s += (self._elapsed_s() - self._running.pop(trial)) * self._gpus

    @property
    def gpu_s(self) -> float:
        """Seconds of GPUs, of running trials too."""
        held_s = sum(self._elapsed_s() - since for since in self._running.values())
        return self._gpu_s + held_s * self._gpus

    def over(self) -> str | None:
        """The key of `search.budget` that is used up, None where none is."""
        spent = {
            "examples": (sum(self._examples.values()), self._budget.examples),
            "wall_s": (self._elapsed_s(), self._wall_s),
            "gpu_hours": (self.gpu_s / HOUR_S, self._budget.gpu_hours),
        }
        used_up = (key for key, (now, most) in spent.items() if most is not None and now >= most)
        return next(used_up, None)
