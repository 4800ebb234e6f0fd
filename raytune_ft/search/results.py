"""The result of a sweep: its trials, their ranking and what they spent. Pure: no Ray, no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raytune_ft.config.load import apply_overrides
from raytune_ft.config.schema import Config
from raytune_ft.config.search import BudgetConfig
from raytune_ft.config.search_space import duration_s
from raytune_ft.records import TrialRecord


def apply_params(config: Config, params: Mapping[str, Any], trial: str, storage: str) -> Config:
    """The config of one trial: a run called `trial` in `storage`, without a search of its own.

    Raises:
        ConfigError: the values do not go together.
    """
    own = config.model_copy(update={"search": None, "name": trial, "storage": storage})
    return apply_overrides(own, params)


def trial_name(number: int) -> str:
    """The directory of a trial, such as `trial-007`, from Optuna's number."""
    return f"trial-{number:03d}"


HOUR_S = 3600.0


class Spending:
    """What all trials of a sweep have spent of `search.budget`, over resumes too.

    Args:
        budget: None limits nothing.
        examples: trial -> examples that it trained on under earlier drivers.
        gpu_s: GPU seconds of earlier drivers.
        gpus: GPUs that one trial holds; below 1 where trials share a GPU.
        elapsed_s: gives the seconds that all drivers have run so far.
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
        """A trial has been given its workers."""
        self._running[trial] = self._elapsed_s()

    def trained(self, trial: str, examples: int) -> None:
        """A trial has trained on `examples` in all, counted over resumes."""
        self._examples[trial] = max(examples, self._examples.get(trial, 0))

    def ended(self, trial: str) -> None:
        """A trial has given back its workers."""
        if trial in self._running:
            self._gpu_s += (self._elapsed_s() - self._running.pop(trial)) * self._gpus

    @property
    def gpu_s(self) -> float:
        """GPU seconds, those of running trials included."""
        held_s = sum(self._elapsed_s() - since for since in self._running.values())
        return self._gpu_s + held_s * self._gpus

    def over(self) -> str | None:
        """The key of `search.budget` that is used up; None where none is."""
        spent = {
            "examples": (sum(self._examples.values()), self._budget.examples),
            "wall_s": (self._elapsed_s(), self._wall_s),
            "gpu_hours": (self.gpu_s / HOUR_S, self._budget.gpu_hours),
        }
        used_up = (key for key, (now, most) in spent.items() if most is not None and now >= most)
        return next(used_up, None)


SweepStatus = Literal["completed", "failed", "interrupted"]
# A pruned trial counts: the trials that were better when it was stopped may have failed later.
USABLE = ("completed", "early_stopped", "pruned")


@dataclass(frozen=True)
class SweepResult:
    """`result.json` of a sweep.

    Attributes:
        base: figures of the base on validation.
        best: id, parameters and loss of the best trial; None where no trial is usable.
        ended_by: the key of `search.budget` that was used up.
        pareto: the completed trials that no other one dominates; None where there is one metric.
    """

    status: SweepStatus
    base: Mapping[str, float] | None
    best: Mapping[str, Any] | None
    trials: tuple[TrialRecord, ...]
    makespan_s: float
    execution: str
    error: str | None = None
    ended_by: str | None = None
    pareto: tuple[str, ...] | None = None


def sweep_result(
    trials: Sequence[TrialRecord],
    base: Mapping[str, float] | None,
    makespan_s: float,
    interrupted: bool,
    mode: str,
    execution: str,
) -> SweepResult:
    """The trials in the order of their ids, and the best usable one."""
    ranked = ranking(trials, mode)
    error = None
    status: SweepStatus = "completed"
    if interrupted:
        status = "interrupted"
    elif not ranked:
        status, error = "failed", f"none of {len(trials)} trials is usable: {_first_error(trials)}"
    best = ranked[0] if ranked else None
    return SweepResult(
        status=status,
        base=base,
        best={"trial": best.id, "params": best.params, "eval_loss": best.eval_loss}
        if best
        else None,
        trials=tuple(sorted(trials, key=lambda trial: trial.id)),
        makespan_s=makespan_s,
        execution=execution,
        error=error,
    )


def ranking(trials: Sequence[TrialRecord], mode: str) -> list[TrialRecord]:
    """Usable trials, best first by their best value of the search's metric; ties by number."""
    sign = 1 if mode == "min" else -1
    usable = [trial for trial in trials if trial.status in USABLE and _is_finite(trial.value)]
    return sorted(usable, key=lambda trial: (sign * (trial.value or 0.0), trial.id))


def _first_error(trials: Sequence[TrialRecord]) -> str:
    return next((trial.error for trial in trials if trial.error), "there were none")


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
