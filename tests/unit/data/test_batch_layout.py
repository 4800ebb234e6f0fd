"""A layout holds every example once, within its budget, in as many passes on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from raytune_ft.data.batch import lay_out


def _lengths(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 60, count).tolist()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 33])
@pytest.mark.parametrize("micro_tokens", [1, 100, 10_000])
def test_every_example_once_within_the_budget(
    packing: bool, world_size: int, count: int, micro_tokens: int
) -> None:
    lengths = _lengths(count, count)
    ranks = lay_out(lengths, world_size, micro_tokens, packing)
    placed = [position for rank in ranks for micro in rank for row in micro for position in row]
    assert sorted(placed) == list(range(count))
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks) == world_size
    for micro in (micro for rank in ranks for micro in rank if micro):
        width = max(sum(lengths[position] for position in row) for row in micro)
        assert len(micro) * width <= micro_tokens or len(micro) == 1
        assert packing or all(len(row) == 1 for row in micro)


def test_packed_rows_are_no_longer_than_the_longest_example() -> None:
    lengths = _lengths(0, 200)
    (rank,) = lay_out(lengths, 1, 500, True)
    rows = [row for micro in rank for row in micro]
    assert max(sum(lengths[position] for position in row) for row in rows) == max(lengths)
    assert len(rows) < 0.75 * len(lengths)  # and it does pack


def test_work_is_balanced_over_ranks() -> None:
    lengths = _lengths(1, 64)
    loads = [
        sum(lengths[position] for micro in rank for row in micro for position in row)
        for rank in lay_out(lengths, 4, 500, True)
    ]
    assert max(loads) - min(loads) <= max(lengths)


@pytest.mark.parametrize(("packing", "wide"), [(True, 0), (True, 400), (False, 0)])
def test_the_sequences_of_an_example_share_a_micro_batch(packing: bool, wide: int) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 2 * 40).tolist()
    ranks = lay_out(lengths, 3, 400, packing, parts=2, wide=wide)
    seen: list[int] = []
    padded = 0
    for micro in (micro for rank in ranks for micro in rank if micro):
        numbers = [number for row in micro for number in row]
        pairs = {number // 2 for number in numbers}
        assert sorted(numbers) == sorted([2 * n for n in pairs] + [2 * n + 1 for n in pairs])
        assert packing or all(len(row) == 1 for row in micro)
        width = max(sum(lengths[number] for number in row) for row in micro)
        assert width * len(micro) <= 400
        padded += width * len(micro)
        seen += numbers
    assert sorted(seen) == list(range(80))
    assert padded < (1.01 if wide else 1.8) * sum(lengths)
