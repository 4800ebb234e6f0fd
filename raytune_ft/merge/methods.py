"""How several tensors become one: pure functions of float32 tensors.

The constants in capitals are the `formula` of the entries of `config.merging.MERGES`.

A function gets the same rows of every member's tensor and of the base's, and the `facts` that its
`measure` computed from the whole tensors, such as norms and thresholds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rows = Iterable[tuple[Sequence[Tensor], Tensor]]
"""All rows of a tensor, a few at a time: (those of every member, those of the base)."""

TASK_ARITHMETIC_SCALE = 0.4
TIES_DENSITY, DARE_DENSITY = 0.2, 0.5
SLERP_PARALLEL = 0.9995


@dataclass(frozen=True)
class MergeSettings:
    """Settings of a merge; None is the formula's own default.

    Attributes:
        weights: one for every member; None is equal weights.
        scale: factor of the sum of deltas (lambda); 0.4 for task_arithmetic and dare, 1 for ties
            and dare_ties.
        density: share of every delta that is kept; 0.2 for ties, 0.5 for dare and dare_ties.
        position: slerp's t, from the first member (0) to the second (1).
        seed: for the elements that dare drops.
    """

    weights: tuple[float, ...] | None = None
    scale: float | None = None
    density: float | None = None
    position: float = 0.5
    seed: int = 0

    def weight(self, index: int) -> float:
        """The weight of a member."""
        return 1.0 if self.weights is None else self.weights[index]


@dataclass(frozen=True)
class Position:
    """Which rows of which tensor these are: dare drops an element by its position alone."""

    name: str
    first_element: int = 0


@dataclass(frozen=True)
class Formula:
    """How the same tensor of several members becomes one.

    Attributes:
        name: what the manifest of a merge calls it.
        combine: (members' rows, the base's rows, settings, facts, position) -> merged rows.
        measure: (all rows, elements of the whole tensor, settings) -> the `facts` for `combine`.
        shares: (settings, number of members) -> the factor of each member's delta, where the merge
            is a sum of deltas.
        least, most: members that it takes; None is any number.
    """

    name: str
    combine: Callable[[Sequence[Tensor], Tensor, MergeSettings, Any, Position], Tensor]
    measure: Callable[[Callable[[], Rows], int, MergeSettings], Any] | None = None
    shares: Callable[[MergeSettings, int], list[float]] | None = None
    least: int = 1
    most: int | None = None


def linear(
    tensors: Sequence[Tensor], base: Tensor, settings: MergeSettings, facts: Any, at: Position
) -> Tensor:
    """The weighted mean (model soups, arXiv 2203.05482)."""
    total = torch.zeros_like(tensors[0])
    for index, tensor in enumerate(tensors):
        total.add_(tensor, alpha=settings.weight(index))
    return total / sum(settings.weight(index) for index in range(len(tensors)))


def task_arithmetic(
    tensors: Sequence[Tensor], base: Tensor, settings: MergeSettings, facts: Any, at: Position
) -> Tensor:
    """base + scale * sum of weighted deltas (arXiv 2212.04089)."""
    total = torch.zeros_like(base)
    for index, tensor in enumerate(tensors):
        total.add_(tensor - base, alpha=settings.weight(index))
    return base + _scale(settings, TASK_ARITHMETIC_SCALE) * total


def slerp(
    tensors: Sequence[Tensor],
    base: Tensor,
    settings: MergeSettings,
    facts: tuple[float, float],
    at: Position,
) -> Tensor:
    """Along the great circle through two tensors; along the line where they are nearly parallel."""
    return facts[0] * tensors[0] + facts[1] * tensors[1]


def measure_slerp(
    rows: Callable[[], Rows], count: int, settings: MergeSettings
) -> tuple[float, float]:
    """The factors of the two tensors."""
    squares, dot = [0.0, 0.0], 0.0
    for tensors, _ in rows():
        first, second = tensors[0].double(), tensors[1].double()
        squares[0] += first.square().sum().item()
        squares[1] += second.square().sum().item()
        dot += (first * second).sum().item()
    lengths = [math.sqrt(square) if square > 1e-16 else 1.0 for square in squares]
    cosine = max(-1.0, min(1.0, dot / (lengths[0] * lengths[1])))
    t = settings.position
    if abs(cosine) > SLERP_PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def ties(
    tensors: Sequence[Tensor],
    base: Tensor,
    settings: MergeSettings,
    facts: Sequence[float],
    at: Position,
) -> Tensor:
    """Trim, elect sign, merge disjointly (arXiv 2306.01708).

    `facts`: the smallest magnitude of every member's delta that is kept.
    """
    deltas = []
    for index, (tensor, threshold) in enumerate(zip(tensors, facts, strict=True)):
        delta = tensor - base
        deltas.append(settings.weight(index) * delta * (delta.abs() >= threshold))
    return base + _scale(settings, 1.0) * _agreeing_mean(deltas, settings)


def measure_ties(
    rows: Callable[[], Rows], count: int, settings: MergeSettings
) -> tuple[float, ...]:
    """The exact k-th largest magnitude of every member's delta, in two passes without a sort.

    Bits of floats that are not negative sort as the floats do: the first pass counts their upper
    halves, the second the lower ones of those that share the upper half looked for.
    """
    kept = max(1, int(_density(settings, TIES_DENSITY) * count))
    uppers, lefts = [], []
    for counts in _histograms(rows, lambda bits, _: bits >> 16):
        upper, left = _bucket(counts, kept)
        uppers.append(upper)
        lefts.append(left)

    def lower(bits: Any, member: int) -> Any:
        return bits[(bits >> 16) == uppers[member]] & 0xFFFF

    thresholds = []
    for member, counts in enumerate(_histograms(rows, lower)):
        low, _ = _bucket(counts, lefts[member])
        bits = np.array([(uppers[member] << 16) | low], np.int32)
        thresholds.append(float(bits.view(np.float32)[0]))
    return tuple(thresholds)


def dare(
    tensors: Sequence[Tensor], base: Tensor, settings: MergeSettings, facts: Any, at: Position
) -> Tensor:
    """Drop a random share of every delta, rescale the rest, add up (arXiv 2311.03099)."""
    deltas = _dropped(tensors, base, settings, at)
    total = sum(deltas[1:], deltas[0])
    return base + _scale(settings, TASK_ARITHMETIC_SCALE) * total


def dare_ties(
    tensors: Sequence[Tensor], base: Tensor, settings: MergeSettings, facts: Any, at: Position
) -> Tensor:
    """Drop as in dare, then elect sign and merge as in ties."""
    deltas = _dropped(tensors, base, settings, at)
    return base + _scale(settings, 1.0) * _agreeing_mean(deltas, settings)


def mean_shares(settings: MergeSettings, count: int) -> list[float]:
    """The members' shares of the weighted mean."""
    weights = [settings.weight(index) for index in range(count)]
    return [weight / sum(weights) for weight in weights]


def sum_shares(settings: MergeSettings, count: int) -> list[float]:
    """The members' factors in the scaled sum of deltas."""
    scale = _scale(settings, TASK_ARITHMETIC_SCALE)
    return [scale * settings.weight(index) for index in range(count)]


LINEAR = Formula("linear", linear, shares=mean_shares)
TASK_ARITHMETIC = Formula("task_arithmetic", task_arithmetic, shares=sum_shares)
SLERP = Formula("slerp", slerp, measure_slerp, least=2, most=2)
TIES = Formula("ties", ties, measure_ties)
DARE = Formula("dare", dare)
DARE_TIES = Formula("dare_ties", dare_ties)


def _scale(settings: MergeSettings, default: float) -> float:
    return default if settings.scale is None else settings.scale


def _density(settings: MergeSettings, default: float) -> float:
    return default if settings.density is None else settings.density


def _agreeing_mean(deltas: Sequence[Tensor], settings: MergeSettings) -> Tensor:
    """Per element the mean over the members whose delta has the sign of the weighted sum."""
    majority = (sum(deltas[1:], deltas[0]) >= 0).float() * 2 - 1
    total, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for index, delta in enumerate(deltas):
        agrees = delta.sign() == majority
        total += delta * agrees
        divisor += settings.weight(index) * agrees
    return total / torch.where(divisor == 0, 1.0, divisor)


def _dropped(
    tensors: Sequence[Tensor], base: Tensor, settings: MergeSettings, at: Position
) -> list[Tensor]:
    density = _density(settings, DARE_DENSITY)
    deltas = []
    for index, tensor in enumerate(tensors):
        delta = settings.weight(index) * (tensor - base)
        if density < 1:
            chosen = _uniform(f"{settings.seed} {index} {at.name}", at, delta.numel())
            delta = delta * (chosen.view(delta.shape) < density) / density
        deltas.append(delta)
    return deltas


def _uniform(key: str, at: Position, count: int) -> Tensor:
    """Numbers in [0, 1) that depend only on `key` and the elements' positions.

    Philox gives 8 numbers for every value of its counter.
    """
    digest = hashlib.sha256(key.encode()).digest()
    counter, skipped = divmod(at.first_element, 8)
    philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=counter)
    drawn = np.random.Generator(philox).random(skipped + count, dtype=np.float32)
    return torch.from_numpy(drawn[skipped:])


def _histograms(rows: Callable[[], Rows], of: Callable[[Any, int], Any]) -> list[Any]:
    """For every member, counts of the 65,536 values that `of` makes of the bits of its delta."""
    counts: list[Any] = []
    for tensors, base in rows():
        counts = counts or [np.zeros(1 << 16, np.int64) for _ in tensors]
        for member, tensor in enumerate(tensors):
            bits = (tensor - base).abs().contiguous().view(-1).numpy().view(np.int32)
            counts[member] += np.bincount(of(bits, member), minlength=1 << 16)
    return counts


def _bucket(counts: Any, kept: int) -> tuple[int, int]:
    """The value of the `kept`-th largest element, and its rank among those of the same value."""
    above = np.cumsum(counts[::-1])[::-1]  # of this value or more
    value = int(np.nonzero(above >= min(kept, above[0]))[0][-1])
    return value, kept - int(above[value] - counts[value])
