"""Figures of a model over a set of examples, and the paired bootstrap that compares two models.

Shapes: n examples, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_ft.config.objectives import Figure, Mode, ratio

Column = npt.NDArray[Any]
"""`[n]`, or `[n, L]`: numbers, or truth values that count as 0 and 1."""

DRAWS = 2000
FEWEST_EXAMPLES = 10
"""Draws from fewer examples repeat the same few values, so that no interval is given."""
CONFIDENCE = 0.95
FEWEST_DRAWS, MAX_NUMBERS = 400, 200_000_000
"""Many examples need fewer draws, and 2,000 would take minutes."""
_CHUNK = 4_000_000  # numbers drawn at a time


Fit = Callable[[tuple[Column, ...], Column], Column]
"""From columns and `[D, n]`, how often each draw has each example, to the value of every draw."""


@dataclass(frozen=True, eq=False)
class Scores:
    """One figure of one model: `formula` of the sums of its columns over all examples.

    Attributes:
        by_example: scores.jsonl has its value for each example, where there is one.
        known: `[n]` truth values, of which examples have a value; None where all do. The columns of
            the others are 0, and a comparison leaves them out of both models.
        fit: stands for `formula` where the figure is estimated from the examples themselves.
    """

    columns: tuple[Column, ...]
    mode: Mode = "max"
    formula: Callable[..., float] = ratio
    by_example: bool = True
    known: Column | None = None
    fit: Fit | None = None

    @classmethod
    def of(cls, figure: Figure, columns: Mapping[str, Column]) -> Scores:
        """A declared figure, from columns by name."""
        own = tuple(columns[name] for name in figure.columns)
        return cls(own, figure.mode, figure.formula)

    @classmethod
    def mean(cls, values: Sequence[float] | Column, mode: Mode = "max") -> Scores:
        """The mean of one score for each example."""
        column = np.asarray(values, np.float64)
        return cls((column, np.ones_like(column)), mode)

    @classmethod
    def known_mean(cls, values_n: Column, mode: Mode = "max") -> Scores:
        """The mean of the scores that are there; NaN stands for one that is missing."""
        known = ~np.isnan(values_n)
        columns = (np.where(known, values_n, 0.0), known.astype(np.float64))
        return cls(columns, mode, known=None if known.all() else known)

    def at(self, examples: Column) -> Scores:
        """The same over these examples, truth values or numbers."""
        return replace(self, columns=tuple(each[examples] for each in self.columns), known=None)

    @property
    def value(self) -> float:
        """The figure over all examples."""
        if self.fit is not None:
            return float(self.fit(self.columns, np.ones((1, len(self.columns[0]))))[0])
        return self.formula(*(column.sum(0) for column in self.columns))

    @property
    def each(self) -> Column | None:
        """`[n]`: the figure of every example alone, NaN for one that counts nothing; None where it
        is not a mean over examples.
        """
        if self.formula is not ratio or self.fit is not None or not self.by_example:
            return None
        top, bottom = self.columns
        return np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom != 0)


@dataclass(frozen=True)
class Difference:
    """`b - a` of a figure over the same examples, with a paired bootstrap interval.

    With fewer than `FEWEST_EXAMPLES` examples, or where a value is not finite, the interval has no
    finite ends.
    """

    value: float
    low: float
    high: float

    @property
    def covers_zero(self) -> bool:
        """Whether the interval contains zero, so that the data show no difference."""
        return self.low <= 0 <= self.high

    @property
    def interval(self) -> tuple[float, float] | None:
        """`(low, high)`; None where the examples are too few or a value is not finite."""
        return (self.low, self.high) if math.isfinite(self.high - self.low) else None


def difference(a: Scores, b: Scores, seed: int = 0, draws: int = DRAWS) -> Difference:
    """Paired percentile bootstrap (Efron, 1979): every draw has the same examples of both, out of
    those that have a value in both.
    """
    known = [each.known for each in (a, b) if each.known is not None]
    if known:
        both = np.logical_and.reduce(known)
        a, b = a.at(both), b.at(both)
    n, rng = len(a.columns[0]), np.random.default_rng(seed)
    if n < FEWEST_EXAMPLES or not (math.isfinite(a.value) and math.isfinite(b.value)):
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


def _resampled(scores: Scores, picks_DN: npt.NDArray[np.int64]) -> Column:
    """`[D]`: the figure of every draw."""
    if scores.fit is not None:
        return scores.fit(scores.columns, _counts(picks_DN))
    sums = [_sums(column, picks_DN) for column in scores.columns]
    if scores.formula is ratio:
        top, bottom = sums
        return np.divide(top, bottom, out=np.zeros(len(picks_DN)), where=bottom != 0)
    return np.array([scores.formula(*each) for each in zip(*sums, strict=True)])


def _sums(column: Column, picks_DN: npt.NDArray[np.int64]) -> Column:
    """`[D]` or `[D, L]`: the sum of a column over every draw."""
    if column.ndim == 1:
        return column[picks_DN].sum(1)
    return _counts(picks_DN) @ column.astype(np.float64)


def _counts(picks_DN: npt.NDArray[np.int64]) -> Column:
    """`[D, n]`: how often each draw has each example."""
    draws, n = picks_DN.shape
    places = picks_DN + n * np.arange(draws)[:, None]
    counts_DN = np.bincount(places.ravel(), minlength=draws * n).reshape(draws, n)
    return counts_DN.astype(np.float64)
