"""What comes out of a sweep: rows, the best of them, a status. Pure: no ray, no files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raytune_ft.records import TrialRecord

SweepStatus = Literal["completed", "failed", "interrupted"]
# A pruned trial was worse than others when it was stopped; it counts when those failed later on.
USABLE = ("completed", "early_stopped", "pruned")


@dataclass(frozen=True)
class SweepResult:
    """`result.json` of a sweep. `best` is None where no trial is usable; `ended_by` is the key of
    `search.budget` that was used up, `pareto` the completed trials that no other one beats in every
    metric, None where there is one metric.
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
    """Rows in the order of their numbers, and the best usable one."""
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
