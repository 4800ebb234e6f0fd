"""Arrays that are as long as the data: on disk, and computed block by block.

What is held in memory beside them is a block, or a byte for each example.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Empty = Callable[[int, Any], Array]
"""(length, dtype) -> an array to be filled: `numpy.empty`, or `empty_on_disk` of a folder."""

BLOCK = 2**16
BLOCK_TOKENS = 2**20


def empty_on_disk(folder: Path, length: int, dtype: Any) -> Array:
    """Zeros whose pages belong to a file in `folder` without a name, which the system writes out
    where memory is short, and removes with the array.
    """
    size = max(length * np.dtype(dtype).itemsize, 1)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size)
        return np.frombuffer(mmap.mmap(file.fileno(), size), dtype, length)


def spans(length: int) -> Iterator[slice]:
    """The places of one block after another."""
    for start in range(0, length, BLOCK):
        yield slice(start, min(start + BLOCK, length))


def token_spans(offsets: Indices) -> Iterator[slice]:
    """As `spans`, of about `BLOCK_TOKENS` tokens each; example `i` has those from `offsets[i]` to
    `offsets[i + 1]`.
    """
    start = 0
    while start < len(offsets) - 1:
        ends = offsets[start + 1 : start + 1 + BLOCK]
        whole = int(np.searchsorted(ends, offsets[start] + BLOCK_TOKENS, side="right"))
        yield slice(start, start + max(whole, 1))
        start += max(whole, 1)


def items(begins: Array, lengths: Array) -> Indices | slice:
    """The places of all items of these spans: a slice where they follow each other."""
    ends = begins + lengths
    if np.array_equal(begins[1:], ends[:-1]):
        return slice(int(begins[0]), int(ends[-1]))
    before = np.cumsum(lengths, dtype=np.int64) - lengths
    found: Indices = np.repeat(begins - before, lengths) + np.arange(int(lengths.sum()))
    return found


def taken(values: Array, order: Indices, empty: Empty, dtype: Any = None) -> Array:
    """`values[order]`, of `[n]` or `[n, width]`; by default of the dtype of `values`."""
    shape = (len(order), *values.shape[1:])
    found = empty(math.prod(shape), dtype or values.dtype).reshape(shape)
    for at in spans(len(order)):
        found[at] = values[order[at]]
    return found


def numbered(length: int, empty: Empty) -> Indices:
    """`numpy.arange(length)`."""
    found = empty(length, np.int64)
    for at in spans(length):
        found[at] = np.arange(at.start, at.stop)
    return found


def where(chosen: npt.NDArray[np.bool_], empty: Empty) -> Indices:
    """`numpy.flatnonzero(chosen)`."""
    found, filled = empty(int(np.count_nonzero(chosen)), np.int64), 0
    for at in spans(len(chosen)):
        own = np.flatnonzero(chosen[at]) + at.start
        found[filled : filled + len(own)] = own
        filled += len(own)
    return found


def summed(values: Array, empty: Empty) -> Indices:
    """`[n + 1]`: the sums of all values before each one, and of all."""
    found = empty(len(values) + 1, np.int64)
    found[0] = 0
    for at in spans(len(values)):
        np.cumsum(values[at], out=found[at.start + 1 : at.stop + 1])
        found[at.start + 1 : at.stop + 1] += found[at.start]
    return found


def grouped(numbers: Indices, empty: Empty) -> Indices:
    """`numpy.argsort(numbers, kind="stable")`, of numbers that are not negative and not sparse."""
    counts, found = empty(int(numbers.max()) + 1, np.int64), empty(len(numbers), np.int64)
    counts[:] = 0
    for at in spans(len(numbers)):
        some, times = np.unique(numbers[at], return_counts=True)
        counts[some] += times
    places = summed(counts, empty)
    for at in spans(len(numbers)):
        order = np.argsort(numbers[at], kind="stable")
        own = numbers[at][order]
        some, first, times = np.unique(own, return_index=True, return_counts=True)
        found[places[own] + np.arange(len(own)) - np.repeat(first, times)] = order + at.start
        places[some] += times
    return found


def joined(arrays: list[Indices], empty: Empty) -> Indices:
    """One after another."""
    if len(arrays) == 1:
        return arrays[0]
    found, filled = empty(sum(map(len, arrays)), np.int64), 0
    for one in arrays:
        found[filled : filled + len(one)] = one
        filled += len(one)
    return found
