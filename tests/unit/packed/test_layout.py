"""Which examples go into a pass."""

from __future__ import annotations

import numpy as np
import pytest

from raytune_ft.packed.layout import plan_pass


def _passes(
    waiting: list[list[int]], micro_tokens: int, packing: bool, ranks: int = 1
) -> list[tuple[int, list[list[list[int]]]]]:
    """Until nobody waits: the first slot, and the lengths in every row of every slot."""
    waiting = [sorted(lengths, reverse=True) for lengths in waiting]
    found, first = [], 0
    while all(waiting):
        first = first if first < len(waiting) else 0
        plan = plan_pass(waiting[first:], micro_tokens, packing, ranks)
        rows = []
        for slot, own in enumerate(plan.rows, start=first):
            rows.append([[waiting[slot][position] for position in row] for row in own])
            taken = {position for row in own for position in row}
            assert sum(map(len, own)) == len(taken) > 0
            kept = enumerate(waiting[slot])
            waiting[slot] = [length for position, length in kept if position not in taken]
        found.append((first, rows))
        first += len(plan.rows)
    return found


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro_tokens", [1, 100, 2000])
def test_passes_are_rectangles_within_the_budget(
    micro_tokens: int, packing: bool, ranks: int
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        waiting = [rng.integers(2, 40, rng.integers(1, 20)).tolist() for _ in range(5)]
        for _, rows in _passes(waiting, micro_tokens, packing, ranks):
            heights = {len(own) for own in rows}
            assert len(heights) == 1
            assert len(rows[0]) % ranks == 0
            for rank in range(ranks):
                mine = [own[rank::ranks] for own in rows]
                width = max(sum(row) for own in mine for row in own)
                least = len(mine) == len(mine[0]) == 1
                assert least or len(mine) * len(mine[0]) * width <= micro_tokens
            assert packing or all(len(row) <= 1 for own in rows for row in own)


def test_equal_steps_take_one_pass() -> None:
    assert len(_passes([[10] * 8] * 4, 2000, True)) == 1


def test_ranks_share_the_rows_of_each_slot() -> None:
    ((_, rows),) = _passes([[10] * 8, [10] * 2], 2000, False, ranks=2)
    assert [[sum(map(sum, own[rank::2])) for rank in range(2)] for own in rows] == [
        [40, 40],
        [10, 10],
    ]
    ((_, rows),) = _passes([[10], [20]], 2000, True, ranks=2)
    assert rows == [[[10], []], [[20], []]]


def test_a_larger_batch_takes_several_passes() -> None:
    """The smaller one takes a step in each of them, unless a pass costs more than its padding."""
    ((_, rows),) = _passes([[10] * 40, [10] * 320], 20_000, False)
    assert [len(own) for own in rows] == [40, 40]
    ((_, rows),) = _passes([[10] * 4, [10] * 8], 20_000, False)
    assert [len(own) for own in rows] == [8, 8]


def test_slots_take_turns_where_not_all_fit() -> None:
    passes = _passes([[30, 30]] * 5, 100, False)
    assert [first for first, _ in passes[:3]] == [0, 3, 0]
    assert [len(rows) for _, rows in passes[:2]] == [3, 2]


@pytest.mark.parametrize("packing", [True, False])
def test_padding_is_worth_it_where_a_pass_costs_much(packing: bool) -> None:
    """Of two slots one has less to do: its part of a larger pass is padding."""
    waiting = [[10] * 12, [10] * 2]
    sizes = []
    for fixed in (0, 100_000):
        plan = plan_pass(waiting, 2000, packing, fixed=fixed)
        sizes.append(sum(len(row) for own in plan.rows for row in own))
    assert sizes == [4, 14]
