"""Arrays on disk hold what numpy's hold, and the memory beside them does not grow with the data."""

from __future__ import annotations

import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from raytune_ft.data import arrays
from raytune_ft.data.arrays import empty_on_disk, joined, numbered, summed, taken, where
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
    for several in ([order], [order, values, order], []):
        assert np.array_equal(joined(several, empty), np.concatenate([[], *several]))
    assert not list(tmp_path.iterdir())


def drawable(length: int, empty: arrays.Empty) -> Drawable:
    """Two sources, rows of one to three examples."""
    rows = empty(length, np.int64)
    rows[:] = np.cumsum(np.random.default_rng(1).random(length) < 0.6)
    sources = empty(length, np.int16)
    sources[length // 3 :] = 1
    return Drawable(sources, rows, None, frozenset())


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


def test_a_draw_takes_a_few_bytes_of_memory_for_an_example(tmp_path: Path) -> None:
    empty, peaks = partial(empty_on_disk, tmp_path), []
    for length in (500_000, 2_000_000):
        drawn = drawable(length, empty)
        tracemalloc.start()
        hold_out(drawn, 0.01, 0, ("a", "b"), empty)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 1_500_000 < 4
