"""Figures as what they are made of: columns with one value for each example, and a summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raytune_ft.config.metrics import Mode

Column = npt.NDArray[np.float64]
Summary = Callable[..., float]

DRAWS = 2000
FEWEST_EXAMPLES = 10
"""Of fewer, the draws are of the same few values, and say nothing about any other."""
CONFIDENCE = 0.95
FEWEST_DRAWS, MAX_NUMBERS = 400, 200_000_000
"""Over many examples fewer draws do, and 2,000 would take minutes."""
_CHUNK = 4_000_000  # numbers drawn at a time


def ratio(numerators: Column, denominators: Column) -> float:
    """Sum over sum: of a loss per token as of a share of examples."""
    return float(numerators.sum() / denominators.sum())


@dataclass(frozen=True, eq=False)
class Scores:
    """One figure of one model: `summary(*columns)`, each column `[n]`, one value an example."""

    columns: tuple[Column, ...]
    mode: Mode = "max"
    summary: Summary = ratio

    @classmethod
    def mean(cls, values: Sequence[float], mode: Mode = "max") -> Scores:
        """Of one score for each example."""
        column = np.asarray(values, np.float64)
        return cls((column, np.ones_like(column)), mode)

    @property
    def value(self) -> float:
        """The figure over all examples."""
        return self.summary(*self.columns)

    @property
    def each(self) -> Column | None:
        """`[n]`: the figure of every example by itself; None where there is no such thing."""
        if self.summary is not ratio:
            return None
        top, bottom = self.columns
        return np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0)


@dataclass(frozen=True)
class Difference:
    """`b - a` of a figure over the same examples, with a paired bootstrap interval.

    Of fewer than `FEWEST_EXAMPLES` it has no ends: such data tell nothing apart.
    """

    value: float
    low: float
    high: float

    @property
    def covers_zero(self) -> bool:
        """Whether the data do not tell the two apart."""
        return self.low <= 0 <= self.high

    @property
    def interval(self) -> tuple[float, float] | None:
        """`(low, high)`; None where the examples are too few, or are not numbers."""
        return (self.low, self.high) if math.isfinite(self.high - self.low) else None


def difference(a: Scores, b: Scores, seed: int = 0, draws: int = DRAWS) -> Difference:
    """Percentile bootstrap (Efron, 1979): examples are drawn with replacement, for both alike."""
    n, rng = len(a.columns[0]), np.random.default_rng(seed)
    if n < FEWEST_EXAMPLES:
        return Difference(b.value - a.value, -math.inf, math.inf)
    draws = min(draws, max(FEWEST_DRAWS, MAX_NUMBERS // max(1, n)))
    found: list[npt.NDArray[np.float64]] = []
    step = max(1, min(draws, _CHUNK // max(1, n)))
    for start in range(0, draws, step):
        picks_DN = rng.integers(0, n, (min(step, draws - start), n))
        found.append(_resampled(b, picks_DN) - _resampled(a, picks_DN))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Difference(b.value - a.value, float(low), float(high))


def _resampled(scores: Scores, picks_DN: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """`[D]`: the figure of every draw."""
    if scores.summary is ratio:
        top, bottom = scores.columns
        weights = bottom[picks_DN].sum(1)
        return np.divide(
            top[picks_DN].sum(1), weights, out=np.zeros(len(picks_DN)), where=weights != 0
        )
    return np.array([scores.summary(*(c[picks] for c in scores.columns)) for picks in picks_DN])
