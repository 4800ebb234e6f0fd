"""How many examples of one class have the key of an example of another, for any number of examples.

Keys are hashes of 16 bytes. They are dealt out to files by their first bits, so that equal keys
meet in one file and no more than one file is in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

KEY = np.dtype([("high", ">u8"), ("low", ">u8"), ("class", "<i4")])
"""A key and the number of its class."""
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


def keyed(keys: npt.NDArray[Any], classes: npt.NDArray[Any] | int) -> npt.NDArray[Any]:
    """`[n]` of `KEY`, of keys in the first 16 bytes of `[n, width]`."""
    made = np.empty(len(keys), KEY)
    halves = np.ascontiguousarray(keys[:, :16]).view(">u8").reshape(-1, 2)
    made["high"], made["low"], made["class"] = halves[:, 0], halves[:, 1], classes
    return made


def count_matches(
    blocks: Iterable[npt.NDArray[Any]], total: int, classes: int, scratch: Path
) -> Matches:
    """Compare the keys of all blocks, `total` in number; `scratch` is a folder for their files."""
    found = Matches(np.zeros((classes, classes), np.int64), np.zeros(classes, np.int64))
    files = min(-(-total // TOGETHER), MOST_FILES)
    if files <= 1:
        _add(found, np.concatenate([np.empty(0, KEY), *blocks]))
        return found
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".keys-") as folder:
        paths = [Path(folder) / str(number) for number in range(files)]
        _deal(blocks, paths)
        for path in paths:
            if path.exists():
                _add(found, np.fromfile(path, KEY))
                path.unlink()
    return found


def _deal(blocks: Iterable[npt.NDArray[Any]], paths: list[Path]) -> None:
    for block in blocks:
        place = (block["high"] >> np.uint64(32)) * np.uint64(len(paths)) >> np.uint64(32)
        ordered = block[np.argsort(place, kind="stable")]
        ends = np.cumsum(np.bincount(place.astype(np.int64), minlength=len(paths)))
        for path, part in zip(paths, np.split(ordered, ends[:-1]), strict=True):
            if len(part):
                with path.open("ab") as file:
                    part.tofile(file)


def _add(found: Matches, keys: npt.NDArray[Any]) -> None:
    if not len(keys):
        return
    high, low = keys["high"].astype(np.uint64), keys["low"].astype(np.uint64)
    order = np.lexsort((low, high))
    high, low, classes = high[order], low[order], keys["class"][order]
    is_new = np.append(False, (np.diff(high) != 0) | (np.diff(low) != 0))
    group = np.cumsum(is_new)
    has = np.zeros((int(group[-1]) + 1, len(found.distinct)), np.bool_)
    has[group, classes] = True
    found.distinct[:] += has.sum(0)
    for one in range(len(found.distinct)):
        found.shared[one] += np.bincount(classes[has[group, one]], minlength=len(found.distinct))
