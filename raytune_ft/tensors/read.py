"""Read tensors that lie in one or several safetensors files, whole or in parts.

    model.safetensors                     of one process
    model-00001-of-00004.safetensors      of the first of four

Whoever reads asks for any range of any tensor, whatever the number of files. Base models in the
format of Hugging Face are read by the same functions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raytune_ft.errors import CheckpointError
from raytune_ft.tensors.part import Part
from raytune_ft.tensors.write import DTYPES, PARTS


def shard_name(stem: str, rank: int, world_size: int) -> str:
    """The file of a rank, named as Hugging Face names the files of a sharded model."""
    if world_size == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


_RUN = 1 << 24
"""Elements copied at a time: few enough that a part of any size is filled in little memory."""


@dataclass(frozen=True)
class _Piece:
    file: Any
    start: int
    end: int


class Shards:
    """Tensors of several files, opened by `open_shards`."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], pieces: dict[str, list[_Piece]]) -> None:
        self.shapes, self._pieces = shapes, pieces

    def read(self, name: str, start: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Elements `start` to `end` of a tensor read row by row: flat runs and where each begins.

        Reads what is asked for and nothing else, and holds one run at a time.
        """
        for piece in self._pieces[name]:
            low, high = max(start, piece.start), min(end, piece.end)
            if low < high:
                yield low, _flat_slice(piece.file, name, low - piece.start, high - piece.start)

    @torch.no_grad()
    def fill(self, part: Part, name: str, through: torch.dtype | None = None) -> None:
        """Copy into a part what the files hold of it, in the part's own dtype.

        `through`: the values are first rounded to this dtype.
        """
        row = max(1, math.prod(part.shape[1:]))
        run = max(1, _RUN // row) * row
        for low in range(part.start, part.end, run):
            for start, values in self.read(name, low, min(low + run, part.end)):
                into = part.values[start - part.start :][: values.numel()]
                into.copy_(values if through is None else values.to(through))

    def dtype(self, name: str) -> torch.dtype | None:
        """As the files have it; None for a type that this package does not write."""
        return DTYPES.get(self._pieces[name][0].file.get_slice(name).get_dtype())

    def whole(self, name: str) -> Tensor:
        """A tensor in its shape."""
        shape = self.shapes[name]
        runs = [values for _, values in self.read(name, 0, math.prod(shape))]
        if not runs:  # a tensor without elements
            return self._pieces[name][0].file.get_tensor(name)
        return (torch.cat(runs) if len(runs) > 1 else runs[0]).view(shape)


@contextmanager
def open_shards(folder: Path, stem: str = "model") -> Iterator[Shards]:
    """The tensors in the files of `stem` in `folder`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    files = sorted(
        [*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")]
    )
    if not files:
        raise CheckpointError(f"{folder} holds no {stem}.safetensors")
    with open_files(files) as shards:
        yield shards


@contextmanager
def open_files(files: Sequence[Path]) -> Iterator[Shards]:
    """The tensors in some files together.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor lies in several and not in parts.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[_Piece]] = {}
    with ExitStack() as stack:
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, "pt"))
                places = json.loads((file.metadata() or {}).get(PARTS, "{}"))
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged: {error}") from error
            for name in file.keys():  # noqa: SIM118 - no mapping
                held = file.get_slice(name).get_shape()
                start, shape = places.get(name, (0, held))
                shapes[name] = tuple(shape)
                piece = _Piece(file, start, start + math.prod(held))
                pieces.setdefault(name, []).append(piece)
        for name, found in pieces.items():
            found.sort(key=lambda piece: piece.start)
            _check_whole(files[0].parent, name, shapes[name], found)
        yield Shards(shapes, pieces)


def _check_whole(folder: Path, name: str, shape: tuple[int, ...], pieces: list[_Piece]) -> None:
    """Do the pieces cover the tensor from its first to its last element?"""
    reached = 0
    for piece in pieces:
        if piece.start != reached:
            break
        reached = piece.end
    if reached != math.prod(shape) or reached != pieces[-1].end:
        raise CheckpointError(
            f"{folder} holds elements up to {reached} of the {math.prod(shape)} of {name}; "
            "a file of another process is missing"
        )


def _flat_slice(file: Any, name: str, start: int, end: int) -> Tensor:
    """A range of a tensor in one file, reading only the rows that it touches."""
    view = file.get_slice(name)
    shape = view.get_shape()
    row = math.prod(shape[1:])
    if not shape or row == 0:
        return file.get_tensor(name).view(-1)[start:end]
    first = start // row
    rows = view[first : -(-end // row)]
    return rows.reshape(-1)[start - first * row : end - first * row]
