"""Weights that are asked for by rows: of files, of a base with an adapter, of a merge of them.

The names are those of the files of the model. Whoever writes or runs a model from them holds a few
rows at a time, whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from raytune_ft.model.file_weights import Source
from raytune_ft.model.outline import Outline

CHUNK = 1 << 22
"""Elements at a time: 16 MB in float32, of which a computation holds several."""


class Weights(Protocol):
    """A model's tensors. `TensorFiles` is one."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By name, in the order in which they are written."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """In which it is written."""
        ...

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end`: float32 where they were computed, else as they lie on the disk.
        A scalar has one row.
        """
        ...


def row_count(shape: tuple[int, ...]) -> int:
    """Of a tensor; 1 of a scalar."""
    return shape[0] if shape else 1


def spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The rows of a tensor, at most `CHUNK` elements of them at a time and at least one."""
    run = max(1, CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, row_count(shape), run):
        yield start, min(start + run, row_count(shape))


def whole(weights: Weights, name: str) -> Tensor:
    """A tensor in its shape."""
    return weights.rows(name, 0, row_count(weights.shapes[name]))


def converted(source: Source, outline: Outline, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The weights of the model, in float32, that some tensors of its files become."""
    if source.converter is None:
        return {source.target: read(source.tensors[0][1]).float()}
    return source.weights(outline.pattern, lambda name: read(name).float())
