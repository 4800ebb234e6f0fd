"""How many examples of each source a pass of the mix holds, and which ones validate it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from raytune_ft.config.data import DataConfig, MixedSource
from raytune_ft.data.formats import Example
from raytune_ft.data.order import members_of
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError, DataError


def quotas_of(data: DataConfig, split: TokenizedSplit) -> tuple[int, ...]:
    """Examples of each source of `data.train` in a pass over `split`, the training split.

    Raises:
        ConfigError: a source that is to be trained on has none.
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
    """`total` in whole numbers by largest remainder; of equal remainders the first."""
    exact = np.array(shares) * total / sum(shares)
    quotas = np.floor(exact).astype(np.int64)
    left = total - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:left]] += 1
    return [int(quota) for quota in quotas]


def _shares(
    data: DataConfig, sources: Sequence[MixedSource], counts: Sequence[int]
) -> list[float] | None:
    """Shares that add up to 1, None where each source says how often it is seen."""
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
    # So many examples of the mix use each source up once.
    passes = [count / share for count, share in zip(counts, shares, strict=True) if share > 0]
    slack = 1e-9  # what a product and a quotient may lose
    if examples == "shortest":
        return max(1, math.floor(min(passes) * (1 + slack)))
    return math.ceil(max(passes) * (1 - slack))


def draw_validation(
    count: int, fraction: float, seed: int, source: int = 0, label: str = "train"
) -> tuple[list[int], list[int]]:
    """Indices for train and for validation out of `count` examples, both in ascending order.

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
    order = np.random.default_rng([seed, source]).permutation(count)
    return sorted(order[size:].tolist()), sorted(order[:size].tolist())


def hold_out(
    rows: list[Example], fraction: float, seed: int, names: Sequence[str]
) -> tuple[list[Example], list[Example]]:
    """Train and validation examples: the fraction of every source, so that each is measured.

    Examples of one row stay together.
    """
    kept, held = list[Example](), list[Example]()
    for number in sorted({one.source for one in rows}):
        own = [one for one in rows if one.source == number]
        groups = [list(group) for _, group in groupby(own, lambda one: one.origin)]
        if len(groups) == 1:  # an only row, such as a file that is one document
            groups = [[one] for one in groups[0]]
        label = f"train.{names[number]}" if names else "train"
        train, validation = draw_validation(len(groups), fraction, seed, number, label)
        kept += [one for i in train for one in groups[i]]
        held += [one for i in validation for one in groups[i]]
    return kept, held
