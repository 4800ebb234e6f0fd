"""The one stream of training examples, as a pure function of the seed.

Of one source, example `i` of the stream is `permutation(seed, i // n)[i % n]`. Of several, a pass
of the mix holds a fixed number of examples of each, its quota. The places of a pass are dealt out
to the sources by a permutation of their own, and each place takes the next example of its source's
own stream. So any step of any run can be computed without having read what came before it:
resuming needs a counter, not a loader's state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from raytune_ft.config.data import DataConfig, MixedSource
from raytune_ft.data.arrays import Empty, Indices, grouped, joined, numbered, spans, taken, where
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError, DataError

Numbers = npt.NDArray[np.float64]
Members = Indices | range


def quotas_of(data: DataConfig, split: TokenizedSplit) -> tuple[int, ...]:
    """How many examples of each source of `data.train` a pass over the training split holds.

    Raises:
        ConfigError: a source with a share above 0 has no example in a pass.
    """
    if not isinstance(data.train, list):
        return (len(split),)
    counts = [len(each) for each in members_of(split, len(data.train))]
    shares = _shares(data, data.train, counts)
    if shares is None:
        epochs = [1.0 if source.epochs is None else source.epochs for source in data.train]
        quotas = [round(times * count) for times, count in zip(epochs, counts, strict=True)]
        wanted = epochs
    else:
        quotas, wanted = apportioned(_length(data, shares, counts), shares), shares
    for source, share, quota in zip(data.train, wanted, quotas, strict=True):
        if share > 0 and quota == 0:
            written = f"weight={source.weight:g}" if source.weight is not None else "share"
            written = f"epochs={source.epochs:g}" if source.epochs is not None else written
            raise ConfigError(
                f"data.train.{source.called}: {written}",
                f"comes to less than one example of a pass of {sum(quotas):,}",
                "write a larger one, or 0 for a source that is measured and not trained on",
            )
    return tuple(quotas)


def pass_length(data: DataConfig, split: TokenizedSplit) -> int:
    """Examples of an epoch. Raises ConfigError, see `quotas_of`."""
    return sum(quotas_of(data, split))


def apportioned(total: int, shares: Sequence[float]) -> list[int]:
    """`total` split into whole numbers by largest remainder; among equal remainders, the first."""
    exact = np.array(shares) * total / sum(shares)
    quotas = np.floor(exact).astype(np.int64)
    left = total - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:left]] += 1
    return [int(quota) for quota in quotas]


def _shares(
    data: DataConfig, sources: Sequence[MixedSource], counts: Sequence[int]
) -> list[float] | None:
    """Shares that add up to 1; None if sources have epochs instead."""
    mixture = data.mixture
    if any(source.weight is not None for source in sources):
        raw = [source.weight or 0.0 for source in sources]
    elif mixture is not None and mixture.temperature is not None:
        # Over the largest first, or a low temperature would overflow.
        raw = [(count / max(counts)) ** (1 / mixture.temperature) for count in counts]
    elif mixture is not None and mixture.examples != "total":
        raw = [float(count) for count in counts]
    else:
        return None
    return [share / sum(raw) for share in raw]


def _length(data: DataConfig, shares: Sequence[float], counts: Sequence[int]) -> int:
    examples = data.mixture.examples if data.mixture is not None else "total"
    if isinstance(examples, int):
        return examples
    if examples == "total":
        return sum(counts)
    # Length of the mix at which each source is used up once.
    passes = [count / share for count, share in zip(counts, shares, strict=True) if share > 0]
    slack = 1e-9  # rounding of a product and a quotient
    if examples == "shortest":
        return max(1, math.floor(min(passes) * (1 + slack)))
    return math.ceil(max(passes) * (1 - slack))


def draw_validation(
    count: int,
    fraction: float,
    seed: int,
    source: int = 0,
    label: str = "train",
    empty: Empty = np.empty,
) -> npt.NDArray[np.bool_]:
    """[count], which of `count` examples are for validation; the others are for train.

    Raises:
        DataError: one of the two would be empty.
    """
    if count < 2:
        raise DataError(
            f"data.validation={fraction}",
            f"cannot be drawn from {count} usable {label} example",
            f"write at least 2 {label} rows, or a validation source",
        )
    size = min(max(1, round(count * fraction)), count - 1)
    order = numbered(count, empty)
    np.random.default_rng([seed, source]).shuffle(order)
    is_held = np.zeros(count, np.bool_)
    is_held[order[:size]] = True
    return is_held


@dataclass(frozen=True)
class Drawable:
    """What a draw of validation examples depends on, for `n` examples.

    Attributes:
        sources: [n], the number of each one's source.
        rows: [n], equal for examples of one row, which follow each other.
        prompts: [n], the number of the first example with the same prompt, where answers of a
            source are compared with others to the same prompt; None where no source is one.
        rated: the numbers of those sources.
    """

    sources: npt.NDArray[Any]
    rows: Indices
    prompts: Indices | None
    rated: frozenset[int]


def hold_out(
    drawn: Drawable, fraction: float, seed: int, names: Sequence[str], empty: Empty
) -> tuple[Indices, Indices]:
    """Which examples are for train and which for validation; every source gives the fraction, so
    that each is measured.

    Examples of one row stay together, and so do equal prompts where answers are compared, of all
    sources. `empty` makes the arrays that are as long as the data.
    """
    kept, held = list[Indices](), list[Indices]()
    numbers = (set(drawn.sources[at].tolist()) for at in spans(len(drawn.sources)))
    for number in sorted(set().union(*numbers)):
        own = where(drawn.sources == number, empty)
        is_rated = number in drawn.rated
        if is_rated:
            assert drawn.prompts is not None
            groups = _numbered(taken(drawn.prompts, own, empty), empty)
        else:
            groups = _runs(taken(drawn.rows, own, empty))
        count = int(groups.max()) + 1
        if count == 1 and is_rated:
            raise DataError(
                f"data.validation={fraction:g}",
                "is drawn by prompt, and all answers belong to one prompt",
                "write a source as data.validation",
            )
        if count == 1:  # an only row, such as a file that is one document
            groups = np.arange(len(own))
            count = len(own)
        label = f"train.{names[number]}" if names else "train"
        is_held = draw_validation(count, fraction, seed, number, label, empty)
        if is_rated:
            order = grouped(groups, empty)
            own, groups = taken(own, order, empty), taken(groups, order, empty)
        held_n = taken(is_held, groups, np.empty)
        kept.append(taken(own, where(~held_n, empty), empty))
        held.append(taken(own, where(held_n, empty), empty))
    train, validation = joined(kept, empty), joined(held, empty)
    if drawn.prompts is None:
        return train, validation
    # Another source may ask the same.
    is_asked = np.zeros(len(drawn.prompts), np.bool_)
    for at in spans(len(validation)):
        own = validation[at]
        own = own[np.isin(drawn.sources[own], list(drawn.rated))]
        is_asked[drawn.prompts[own]] = True
    also = taken(is_asked, taken(drawn.prompts, train, empty), np.empty)
    moved = taken(train, where(also, empty), empty)
    return taken(train, where(~also, empty), empty), joined([validation, moved], empty)


def _runs(rows: Indices) -> Indices:
    """The number of each one's run of equal rows, written over them."""
    before, number = rows[0], 0
    for at in spans(len(rows)):
        own = rows[at].copy()
        starts = np.diff(own, prepend=before) != 0
        rows[at] = number + np.cumsum(starts)
        before, number = own[-1], int(rows[at.stop - 1])
    return rows


def _numbered(keys: Indices, empty: Empty) -> Indices:
    """The number of each one's key, in the order in which keys appear, written over them."""
    numbers, count = empty(int(keys.max()) + 1, np.int64), 0
    numbers[:] = -1
    for at in spans(len(keys)):
        some, first = np.unique(keys[at], return_index=True)
        new = keys[at][np.sort(first[numbers[some] < 0])]
        numbers[new] = count + np.arange(len(new))
        count += len(new)
        keys[at] = numbers[keys[at]]
    return keys


# Random streams of a whole pass; those of sources are numbered from 0.
PLACES, CHANCES = 2**32 - 1, 2**32 - 2


def permutation(seed: int, number: int, n: int, stream: int = 0) -> Indices:
    """The order of `n` things in pass `number`; every pass has its own."""
    order: Indices = np.arange(n, dtype=np.int32 if n < 2**31 else np.int64)
    np.random.default_rng([seed, number, stream]).shuffle(order)
    return order


@dataclass(frozen=True, eq=False)
class Curriculum:
    """Which examples come first. Positions are those of the stream, ranks those within a source.

    Attributes:
        ranked: for each source, its examples (by their index in the source), the first to come
            first.
        schedule: `sort` puts every pass in that order. The others draw with replacement from the
            beginning of `ranked`: from a share of it that grows from `start` at position 0 to 1 at
            position `end`. After that the stream is the plain one.
    """

    ranked: tuple[Indices, ...]
    schedule: Literal["sort", "linear", "sqrt"]
    start: float = 1.0
    end: int = 0

    def share(self, positions: Indices) -> Numbers:
        """The share of a source that is drawn from: the competence of arXiv 1903.09848."""
        time = np.minimum(positions / max(1, self.end), 1.0)
        if self.schedule == "linear":
            return self.start + time * (1 - self.start)
        return np.sqrt(self.start**2 + time * (1 - self.start**2))


@dataclass(frozen=True, eq=False)
class Order:
    """The stream over a split.

    Attributes:
        members: for each source, its examples in the split; of an only one they are all.
        quotas: for each source, how many of its examples a pass holds.
    """

    seed: int
    members: tuple[Members, ...]
    quotas: tuple[int, ...]
    curriculum: Curriculum | None = None

    @classmethod
    def plain(cls, seed: int, n: int) -> Order:
        """Over `n` examples of one source."""
        return cls(seed, (range(n),), (n,))

    def __len__(self) -> int:
        """Examples of a pass, that is, of an epoch."""
        return sum(self.quotas)

    def indices(self, start: int, count: int) -> Indices:
        """Examples at positions `start .. start + count - 1`; they may straddle passes."""
        parts = [np.empty(0, np.int64)]
        position, end = start, start + count
        while position < end:
            number, offset = divmod(position, len(self))
            take = min(len(self) - offset, end - position)
            parts.append(_whole_pass(self, number)[offset : offset + take])
            position += take
        return np.concatenate(parts)


@lru_cache(maxsize=16)
def _whole_pass(order: Order, number: int) -> Indices:
    """`[len(order)]`: the examples of a pass."""
    curriculum = order.curriculum
    if len(order.members) == 1 and (curriculum is None or curriculum.schedule == "sort"):
        return _own(order, 0, number * len(order), len(order))
    sources_P = np.repeat(np.arange(len(order.quotas)), order.quotas)
    if len(order.members) > 1:
        sources_P = sources_P[permutation(order.seed, number, len(order), PLACES)]
    found_P = np.empty(len(order), np.int64)
    for source, (members, quota) in enumerate(zip(order.members, order.quotas, strict=True)):
        places = np.flatnonzero(sources_P == source)
        found_P[places] = np.asarray(members)[_own(order, source, number * quota, quota)]
    if curriculum is None or curriculum.schedule == "sort":
        return found_P
    positions_P = number * len(order) + np.arange(len(order))
    chances_P = np.random.default_rng([order.seed, number, CHANCES]).random(len(order))
    for source, members in enumerate(order.members):
        places = np.flatnonzero((sources_P == source) & (positions_P < curriculum.end))
        open_P = np.ceil(curriculum.share(positions_P[places]) * len(members))
        picks = (chances_P[places] * open_P).astype(np.int64)
        found_P[places] = np.asarray(members)[curriculum.ranked[source][picks]]
    return found_P


def _own(order: Order, source: int, start: int, count: int) -> Indices:
    """Examples `start .. start + count - 1` of a source's own stream, by their place in it."""
    n = len(order.members[source])
    parts = list[Indices]()
    position, end = start, start + count
    while position < end:
        number, offset = divmod(position, n)
        take = min(n - offset, end - position)
        parts.append(permutation(order.seed, number, n, source)[offset : offset + take])
        position += take
    drawn = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])
    curriculum = order.curriculum
    if curriculum is None or curriculum.schedule != "sort":
        return drawn
    ranks = np.argsort(curriculum.ranked[source])
    return drawn[np.argsort(ranks[drawn], kind="stable")]


def ranked(
    members: tuple[Members, ...], difficulty: Numbers, hard_first: bool
) -> tuple[Indices, ...]:
    """`Curriculum.ranked`; examples of equal difficulty keep the order of the rows."""
    signed = -difficulty if hard_first else difficulty
    return tuple(np.argsort(signed[np.asarray(each)], kind="stable") for each in members)


def members_of(split: TokenizedSplit, count: int) -> tuple[Members, ...]:
    """The examples of each of `count` sources; a split without a column `source` has one."""
    numbers = split.source_numbers
    if numbers is None:
        return (range(len(split)),)
    return tuple(np.flatnonzero(numbers == number) for number in range(count))
