"""The stream of examples is a pure function of the seed, and keeps what a mix and a curriculum say.

Properties are tried on many mixes that are drawn here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from raytune_ft.data.arrays import Indices
from raytune_ft.data.order import Curriculum, Order, ranked


def drawn(count: int = 40) -> Iterator[tuple[np.random.Generator, Order]]:
    """Orders over one to four sources that lie mixed up in their split."""
    for number in range(count):
        rng = np.random.default_rng(number)
        sources = int(rng.integers(1, 5))
        owners = np.concatenate([np.arange(sources), rng.integers(0, sources, 40)])
        rng.shuffle(owners)
        members = tuple(np.flatnonzero(owners == source) for source in range(sources))
        quotas = [int(rng.integers(0, 3 * len(each))) for each in members]
        quotas[0] += 1
        yield rng, Order(int(rng.integers(2**32)), members, tuple(quotas))


def with_curriculum(order: Order, rng: np.random.Generator, **keys: object) -> Order:
    difficulty = rng.random(sum(map(len, order.members)))
    first = ranked(order.members, difficulty, hard_first=False)
    return Order(order.seed, order.members, order.quotas, Curriculum(first, **keys))  # type: ignore[arg-type]


def own_streams(order: Order, indices: Indices) -> list[list[int]]:
    """What each source gave, in order."""
    return [[int(i) for i in indices if i in set(each.tolist())] for each in order.members]


@pytest.mark.parametrize(("seed", "n"), [(0, 1), (3, 10), (2**32 - 1, 257)])
def test_one_source_has_the_order_that_it_always_had(seed: int, n: int) -> None:
    """The published formula, so that runs of earlier versions can be resumed."""
    expected = [
        np.random.default_rng([seed, epoch]).permutation(n)[place]
        for epoch in range(3)
        for place in range(n)
    ]
    assert Order.plain(seed, n).indices(0, 3 * n).tolist() == expected
    one = Order(seed, (np.arange(n),), (n,))
    assert one.indices(0, 3 * n).tolist() == expected


def test_seeds_differ() -> None:
    assert list(Order.plain(0, 20).indices(0, 20)) != list(Order.plain(1, 20).indices(0, 20))


def test_a_pass_holds_its_quotas() -> None:
    for _, order in drawn():
        for number in range(3):
            found = order.indices(number * len(order), len(order))
            counts = [np.isin(found, each).sum() for each in order.members]
            assert tuple(counts) == order.quotas


def test_a_source_is_used_up_before_it_repeats() -> None:
    for _, order in drawn():
        found = own_streams(order, order.indices(0, 4 * len(order)))
        for members, stream in zip(order.members, found, strict=True):
            for start in range(0, len(stream), len(members)):
                part = stream[start : start + len(members)]
                assert len(set(part)) == len(part)
                if len(part) == len(members):
                    assert set(part) == set(members.tolist())


def test_the_places_of_a_pass_are_dealt_out_anew() -> None:
    order = Order(5, (np.arange(10), np.arange(10, 30)), (10, 20))
    passes = [order.indices(start, 30) < 10 for start in (0, 30)]
    assert passes[0].sum() == passes[1].sum() == 10
    assert passes[0].tolist() != passes[1].tolist()
    assert 0 < passes[0][:15].sum() < 10  # not one source after the other


@pytest.mark.parametrize("schedule", [None, "sort", "linear", "sqrt"])
def test_any_cut_of_the_stream_is_the_stream(schedule: str | None) -> None:
    """Any batch size, a resume from any counter, and an order that is made anew."""
    for rng, order in drawn(12):
        if schedule is not None:
            order = with_curriculum(order, rng, schedule=schedule, start=0.1, end=len(order) * 2)
        length = 3 * len(order) + 5
        whole = order.indices(0, length)
        for batch in (1, 7, len(order), 2 * len(order) + 1):
            again = Order(order.seed, order.members, order.quotas, order.curriculum)
            parts = [
                again.indices(start, min(batch, length - start))
                for start in range(0, length, batch)
            ]
            assert np.array_equal(np.concatenate(parts), whole)
        for start in rng.integers(0, length, 5).tolist():
            assert np.array_equal(order.indices(start, length - start), whole[start:])


def test_sort_puts_every_pass_of_a_source_in_order() -> None:
    for rng, order in drawn():
        sorted_order = with_curriculum(order, rng, schedule="sort")
        assert sorted_order.curriculum is not None
        ranks = {
            int(members[place]): rank
            for members, first in zip(order.members, sorted_order.curriculum.ranked, strict=True)
            for rank, place in enumerate(first)
        }
        for start in (0, len(order)):
            plain, found = (each.indices(start, len(order)) for each in (order, sorted_order))
            assert Counter(plain.tolist()) == Counter(found.tolist())
            for stream in own_streams(order, found):
                assert [ranks[i] for i in stream] == sorted(ranks[i] for i in stream)


@pytest.mark.parametrize("schedule", ["linear", "sqrt"])
def test_a_share_of_each_source_opens_up(schedule: str) -> None:
    """By the formulas of the paper; after its end the stream is the plain one."""
    n, end, start = 200, 3000, 0.1
    members = (np.arange(n), np.arange(n, 2 * n))
    first = tuple(np.arange(n)[::-1] for _ in members)  # the last ones are the easiest
    curriculum = Curriculum(first, schedule, start, end)  # type: ignore[arg-type]
    plain = Order(1, members, (n, n))
    order = Order(1, members, (n, n), curriculum)
    found = order.indices(0, end + 2 * n)
    assert np.array_equal(found[end:], plain.indices(end, 2 * n))
    ranks = n - 1 - found[:end] % n
    for position, rank in enumerate(ranks.tolist()):
        time = position / end
        share = (
            start + (1 - start) * time
            if schedule == "linear"
            else (time * (1 - start**2) + start**2) ** 0.5
        )
        assert rank < share * n + 1
    late = ranks[end - 600 :]
    assert late.max() > 0.95 * n  # all are open towards the end
    assert abs(late.mean() - 0.48 * n) < 0.05 * n  # and drawn alike


def test_hard_first_is_the_other_way_round() -> None:
    members = (np.array([0, 2, 4]), np.array([1, 3]))
    difficulty = np.array([5.0, 1.0, 3.0, 1.0, 4.0])
    easy = [each.tolist() for each in ranked(members, difficulty, hard_first=False)]
    hard = [each.tolist() for each in ranked(members, difficulty, hard_first=True)]
    assert easy == [[1, 2, 0], [0, 1]]  # equal ones in the order of the rows
    assert hard == [[0, 2, 1], [0, 1]]
