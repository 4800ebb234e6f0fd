"""Arrays on disk hold what numpy's hold, and the memory beside them does not grow with the data."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from raytune_ft.data import arrays
from raytune_ft.data.arrays import (
    empty_on_disk,
    grouped,
    items,
    joined,
    numbered,
    summed,
    taken,
    token_spans,
    where,
)
from raytune_ft.data.order import Drawable, hold_out


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 1000])
def test_blocks_give_what_numpy_gives_at_once(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "BLOCK", 10)
    empty = partial(empty_on_disk, tmp_path)
    draw = np.random.default_rng(length)
    values, order = draw.integers(0, 9, length), draw.permutation(length)
    wide = draw.random((length, 3))
    assert not empty(length, np.int64).any()
    assert np.array_equal(numbered(length, empty), np.arange(length))
    assert np.array_equal(where(values > 4, empty), np.flatnonzero(values > 4))
    assert np.array_equal(summed(values, empty), np.append(0, np.cumsum(values)))
    assert np.array_equal(taken(values, order, empty), values[order])
    assert np.array_equal(taken(wide, order, empty), wide[order])
    if length:
        assert np.array_equal(grouped(values, empty), np.argsort(values, kind="stable"))
        assert np.array_equal(grouped(order, empty), np.argsort(order))
    for several in ([order], [order, values, order], []):
        assert np.array_equal(joined(several, empty), np.concatenate([[], *several]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("most", [1, 7, 50, 10**6])
def test_blocks_of_tokens(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "BLOCK", 10)
    monkeypatch.setattr(arrays, "BLOCK_TOKENS", most)
    lengths = np.random.default_rng(0).integers(0, 12, 100)
    offsets = np.append(0, np.cumsum(lengths))
    found = list(token_spans(offsets))
    assert [number for at in found for number in range(at.start, at.stop)] == list(range(100))
    for at in found:
        alone = at.stop - at.start == 1
        assert alone or lengths[at].sum() <= most
        assert at.stop - at.start <= 10
        if at.stop < 100 and at.stop - at.start < 10:
            assert lengths[at.start : at.stop + 1].sum() > most


def test_items_of_spans() -> None:
    tokens = np.arange(100)
    for begins, lengths in (([3, 5, 9], [2, 4, 1]), ([50, 7, 7, 90], [3, 0, 5, 1]), ([4], [0])):
        spans = [tokens[begin : begin + n] for begin, n in zip(begins, lengths, strict=True)]
        found = tokens[items(np.array(begins), np.array(lengths))]
        assert np.array_equal(found, np.concatenate(spans))


def drawable(length: int, empty: arrays.Empty) -> Drawable:
    """Two sources, rows of one to three examples."""
    rows = empty(length, np.int64)
    rows[:] = np.cumsum(np.random.default_rng(1).random(length) < 0.6)
    sources = empty(length, np.int16)
    sources[length // 3 :] = 1
    return Drawable(sources, rows, None, frozenset())


def rated_drawable(length: int, empty: arrays.Empty) -> Drawable:
    """The same of three sources, of which two are rated; a third of the prompts are different."""
    plain, prompts = drawable(length, empty), empty(length, np.int64)
    keys = np.random.default_rng(2).integers(0, length // 3, length)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    prompts[:] = first[inverse]
    plain.sources[-length // 4 :] = 2
    return Drawable(plain.sources, plain.rows, prompts, frozenset({0, 2}))


def test_a_draw_on_disk_is_that_of_the_formula(tmp_path: Path) -> None:
    """Rows of each source are permuted by (seed, source), and the first ones are held out."""
    length, seed = 5000, 3
    drawn = drawable(length, np.zeros)
    kept, held = [], []
    for source in (0, 1):
        own = np.flatnonzero(drawn.sources == source)
        rows = np.unique(drawn.rows[own])
        order = np.random.default_rng([seed, source]).permutation(len(rows))
        chosen = rows[order[: round(0.1 * len(rows))]]
        kept.append(own[~np.isin(drawn.rows[own], chosen)])
        held.append(own[np.isin(drawn.rows[own], chosen)])
    for empty in (np.empty, partial(empty_on_disk, tmp_path)):
        train, validation = hold_out(drawn, 0.1, seed, ("a", "b"), empty)
        assert np.array_equal(train, np.concatenate(kept))
        assert np.array_equal(validation, np.concatenate(held))


def test_a_draw_of_prompts_on_disk_is_that_of_the_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of a rated source are permuted by (seed, source) in the order in which they appear,
    and their examples follow each other. What another source holds out of it, no source trains on.
    """
    monkeypatch.setattr(arrays, "BLOCK", 100)
    length, seed = 3000, 3
    drawn = rated_drawable(length, np.zeros)
    assert drawn.prompts is not None
    kept, held = list[int](), list[int]()
    for source in range(3):
        groups: dict[int, list[int]] = {}
        keys = drawn.prompts if source in drawn.rated else drawn.rows
        for place in np.flatnonzero(drawn.sources == source).tolist():
            groups.setdefault(int(keys[place]), []).append(place)
        order = np.random.default_rng([seed, source]).permutation(len(groups))
        chosen = set(order[: round(0.1 * len(groups))].tolist())
        for number, group in enumerate(groups.values()):
            (held if number in chosen else kept).extend(group)
    asked = {drawn.prompts[one] for one in held if drawn.sources[one] in drawn.rated}
    moved = [one for one in kept if drawn.prompts[one] in asked]
    assert len(moved) > 10
    for empty in (np.empty, partial(empty_on_disk, tmp_path)):
        train, validation = hold_out(drawn, 0.1, seed, ("a", "b", "c"), empty)
        assert train.tolist() == [one for one in kept if drawn.prompts[one] not in asked]
        assert validation.tolist() == held + moved


@pytest.mark.parametrize(("made", "most"), [(drawable, 4), (rated_drawable, 7)])
def test_a_draw_takes_a_few_bytes_of_memory_for_an_example(
    made: Callable[[int, arrays.Empty], Drawable], most: int, tmp_path: Path
) -> None:
    empty, peaks = partial(empty_on_disk, tmp_path), []
    for length in (500_000, 2_000_000):
        drawn = made(length, empty)
        tracemalloc.start()
        hold_out(drawn, 0.01, 0, ("a", "b", "c"), empty)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 1_500_000 < most
