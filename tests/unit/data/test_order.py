"""The stream of examples is a pure function of the seed."""

from __future__ import annotations

import numpy as np

from raytune_ft.data.order import example_indices


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    first, second = (example_indices(3, start, 10, 10) for start in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)


def test_any_cut_of_the_stream_is_the_stream() -> None:
    whole = example_indices(0, 0, 37, 10)
    for cut in range(38):
        parts = [example_indices(0, 0, cut, 10), example_indices(0, cut, 37 - cut, 10)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_seeds_differ() -> None:
    assert list(example_indices(0, 0, 20, 20)) != list(example_indices(1, 0, 20, 20))
