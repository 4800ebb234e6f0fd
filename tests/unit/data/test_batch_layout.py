"""A layout holds every example once, within its budget, in as many passes on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from raytune_ft.data.batch import SharedPrompt, lay_out


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


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_tokens", [1, 150, 10_000])
def test_examples_of_one_prompt_share_a_row(world_size: int, parts: int, micro_tokens: int) -> None:
    """Every example is there once, within the budget; ranks have about as much to compute."""
    rng = np.random.default_rng(0)
    prompts = [
        SharedPrompt(bytes([family]), 20 + family) for family in range(5) for _ in range(8 * parts)
    ]
    lengths = [prompt.tokens + 1 + int(rng.integers(1, 12)) for prompt in prompts]
    order = rng.permutation(40)
    numbers = [parts * place + part for place in order.tolist() for part in range(parts)]
    prompts, lengths = [prompts[n] for n in numbers], [lengths[n] for n in numbers]

    def computed(row: tuple[int, ...]) -> int:
        once = {prompts[number] for number in row}
        own = sum(lengths[number] - prompts[number].tokens for number in row)
        return own + sum(prompt.tokens for prompt in once)

    ranks = lay_out(
        lengths, world_size, micro_tokens, True, parts=parts, wide=micro_tokens, prompts=prompts
    )
    placed = [number for rank in ranks for micro in rank for row in micro for number in row]
    assert sorted(placed) == list(range(40 * parts))
    for row in (row for rank in ranks for micro in rank for row in micro):
        examples = {number // parts for number in row}
        assert len(row) == parts * len(examples)
        assert computed(row) <= micro_tokens or len(examples) == 1
    loads = [sum(computed(row) for micro in rank for row in micro) for rank in ranks]
    # Longest first is at most 4/3 of the best, and that is a share and an example more at most.
    assert max(loads) <= 4 / 3 * (sum(loads) / world_size + max(lengths) * parts)
    if micro_tokens == 10_000:
        assert sum(loads) < 0.7 * sum(lengths)
