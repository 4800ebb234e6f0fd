"""Which examples have equal keys, and how many of one class have the key of one of another, for any
number of examples.

Keys are hashes of 16 bytes. They are dealt out to files by their first bits, so that equal keys
meet in one file and no more than one file is in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_ft.data.arrays import Empty, Indices

KEY = np.dtype([("high", ">u8"), ("low", ">u8"), ("number", "<i8")])
"""A key, and the number of the example that has it or of the class of that example."""
TOGETHER = 2**18
"""About how many keys are compared at a time."""
MOST_FILES = 256

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Matches:
    """For c classes.

    Attributes:
        shared: [c, c], at (a, b) the members of b whose key a member of a has.
        distinct: [c], the different keys of each class.
    """

    shared: Counts
    distinct: Counts


def keyed(keys: npt.NDArray[Any], numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`[n]` of `KEY`, of keys in the first 16 bytes of `[n, width]`."""
    made = np.empty(len(keys), KEY)
    halves = np.ascontiguousarray(keys[:, :16]).view(">u8").reshape(-1, 2)
    made["high"], made["low"], made["number"] = halves[:, 0], halves[:, 1], numbers
    return made


def count_matches(
    blocks: Iterable[npt.NDArray[Any]], total: int, classes: int, scratch: Path
) -> Matches:
    """Compare the keys of all blocks, `total` in number, of examples in these classes; `scratch` is
    a folder for their files.
    """
    found = Matches(np.zeros((classes, classes), np.int64), np.zeros(classes, np.int64))
    for group, class_n in _groups(blocks, total, scratch):
        has = np.zeros((int(group[-1]) + 1, classes), np.bool_)
        has[group, class_n] = True
        found.distinct[:] += has.sum(0)
        for one in range(classes):
            found.shared[one] += np.bincount(class_n[has[group, one]], minlength=classes)
    return found


def first_equal(
    blocks: Iterable[npt.NDArray[Any]], total: int, scratch: Path, empty: Empty
) -> Indices:
    """[total], for each example the number of the first one with its key. Blocks hold the keys of
    all examples in their order; see `count_matches`.
    """
    found = empty(total, np.int64)
    for group, numbers in _groups(blocks, total, scratch):
        found[numbers] = numbers[np.flatnonzero(np.diff(group, prepend=-1))][group]
    return found


def _groups(
    blocks: Iterable[npt.NDArray[Any]], total: int, scratch: Path
) -> Iterator[tuple[Indices, Indices]]:
    """(the number of its key, its own number) of each example, those with equal keys together and
    in their order. A pair has all examples of its keys, and key numbers from 0.
    """
    files = min(-(-total // TOGETHER), MOST_FILES)
    if files <= 1:
        whole = np.concatenate([np.empty(0, KEY), *blocks])
        if len(whole):
            yield _sorted(whole)
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".keys-") as folder:
        paths = [Path(folder) / str(number) for number in range(files)]
        _deal(blocks, paths)
        for path in paths:
            if path.exists():
                yield _sorted(np.fromfile(path, KEY))
                path.unlink()


def _deal(blocks: Iterable[npt.NDArray[Any]], paths: list[Path]) -> None:
    for block in blocks:
        place = (block["high"] >> np.uint64(32)) * np.uint64(len(paths)) >> np.uint64(32)
        ordered = block[np.argsort(place, kind="stable")]
        ends = np.cumsum(np.bincount(place.astype(np.int64), minlength=len(paths)))
        for path, part in zip(paths, np.split(ordered, ends[:-1]), strict=True):
            if len(part):
                with path.open("ab") as file:
                    part.tofile(file)


def _sorted(keys: npt.NDArray[Any]) -> tuple[Indices, Indices]:
    high, low = keys["high"].astype(np.uint64), keys["low"].astype(np.uint64)
    order = np.lexsort((low, high))
    high, low = high[order], low[order]
    is_new = np.append(False, (np.diff(high) != 0) | (np.diff(low) != 0))
    return np.cumsum(is_new), keys["number"][order]
