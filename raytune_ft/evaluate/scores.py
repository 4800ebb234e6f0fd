"""Figures as what they are made of: columns with one value for each example, and a summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raytune_ft.config.metrics import Mode
from raytune_ft.data.split import TokenizedSplit

Column = npt.NDArray[np.float64]
Summary = Callable[..., float]

DRAWS = 2000
FEWEST_EXAMPLES = 10
"""Of fewer, the draws are of the same few values, and say nothing about any other."""
CONFIDENCE = 0.95
FEWEST_DRAWS, MAX_NUMBERS = 400, 200_000_000
"""Over many examples fewer draws do, and 2,000 would take minutes."""
BINS = 10
_CHUNK = 4_000_000  # numbers drawn at a time


def ratio(numerators: Column, denominators: Column) -> float:
    """Sum over sum: of a loss per token as of a share of examples."""
    return float(numerators.sum() / denominators.sum())


@dataclass(frozen=True, eq=False)
class Scores:
    """One figure of one model: `summary(*columns)`, each column `[n]`, one value an example, or
    `[n, L]` of a summary that takes it.
    """

    columns: tuple[Column, ...]
    mode: Mode = "max"
    summary: Summary = ratio

    @classmethod
    def mean(cls, values: Sequence[float] | Column, mode: Mode = "max") -> Scores:
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


def by_source(losses: Column, counted: Column, split: TokenizedSplit) -> dict[str, Scores]:
    """The loss over the examples of each source of a split, where it has several."""
    numbers = split.source_numbers
    if numbers is None:
        return {}
    own = {name: np.flatnonzero(numbers == i) for i, name in enumerate(split.sources)}
    return {
        f"eval_loss_{name}": Scores((losses[rows], counted[rows]), "min", _of_a_source)
        for name, rows in own.items()
        if len(rows)
    }


def _of_a_source(losses: Column, counted: Column) -> float:
    """A summary of its own, so that `scores.jsonl`, which has every loss once, leaves it out."""
    return ratio(losses, counted)


def calibration_error(confidences: Column, right: Column) -> float:
    """Mean over ten bins of |confidence - accuracy|, weighted by their examples."""
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, confidences - right, BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def _resampled(scores: Scores, picks_DN: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """`[D]`: the figure of every draw."""
    if scores.summary is ratio:
        top, bottom = scores.columns
        weights = bottom[picks_DN].sum(1)
        return np.divide(
            top[picks_DN].sum(1), weights, out=np.zeros(len(picks_DN)), where=weights != 0
        )
    return np.array([scores.summary(*(c[picks] for c in scores.columns)) for picks in picks_DN])
