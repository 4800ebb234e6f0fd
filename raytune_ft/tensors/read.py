"""Read tensors that lie in one or several safetensors files, whole or any range of them.

    model.safetensors                     of one process
    model-00001-of-00004.safetensors      of the first of four

A tensor lies whole in one file, or in parts in the files of several ranks (see
`tensors.write.write_parts`). Base models in the format of Hugging Face are read by the same class.
Bytes come by `preadv`, not by mapping the files: memory then holds what was asked for and no more.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raytune_ft.errors import CheckpointError, ModelError
from raytune_ft.files import read_json
from raytune_ft.layout import MODEL_INDEX, MODEL_WEIGHTS, shard_files
from raytune_ft.tensors.write import DTYPES, PARTS, Part

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
REMEDY = "write a directory with all of its safetensors files"
_RUN = 1 << 24
"""Elements that `TensorFiles.fill` holds at a time."""

Fault = Callable[[Path, str], Exception]
"""Makes the error of a file or folder from what is wrong with it."""


def _of_model(path: Path, rule: str) -> ModelError:
    return ModelError(str(path), rule, REMEDY)


def _of_checkpoint(path: Path, rule: str) -> CheckpointError:
    return CheckpointError(f"{path} {rule}")


@dataclass(frozen=True)
class _Piece:
    """Elements `start` to `end` of a tensor, which begin at byte `offset` of a file."""

    file: int
    offset: int
    start: int
    end: int


@dataclass
class _Held:
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[_Piece]


class TensorFiles:
    """Tensors of several files by name; a context manager that keeps the files open."""

    def __init__(self, files: Sequence[Path], fault: Fault = _of_model) -> None:
        """
        Raises:
            ModelError, or what `fault` makes: a file is missing, truncated or not safetensors;
                it holds a type that torch does not compute with; the parts of a tensor are not
                all there.
        """
        self.files = list(files)
        self._fault = fault
        self._stack = ExitStack()
        self._descriptors: list[int] = []
        self._held: dict[str, _Held] = {}
        try:
            for number, path in enumerate(self.files):
                self._add(path, number)
                self._descriptors.append(os.open(path, os.O_RDONLY))
                self._stack.callback(os.close, self._descriptors[-1])
            for name, held in self._held.items():
                self._check_whole(name, held)
        except BaseException:
            self._stack.close()
            raise
        self.shapes: Mapping[str, tuple[int, ...]] = {n: h.shape for n, h in self._held.items()}
        """By name, in the order of the files."""

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def dtype(self, name: str) -> torch.dtype:
        """As it lies in its file."""
        return self._held[name].dtype

    def elements(self, name: str, start: int, end: int) -> Tensor:
        """Elements `start` to `end` `[n]` of a tensor read row by row, in the file's dtype."""
        held = self._held[name]
        data = torch.empty(end - start, dtype=held.dtype)
        for piece in held.pieces:
            low, high = max(start, piece.start), min(end, piece.end)
            if low < high:
                view = memoryview(data[low - start : high - start].view(torch.uint8).numpy().data)
                offset = piece.offset + (low - piece.start) * held.dtype.itemsize
                self._read(piece.file, view, offset)
        return data

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end` of a tensor, in the file's dtype; a scalar has one row."""
        shape = self._held[name].shape
        row = math.prod(shape[1:])
        return self.elements(name, start * row, end * row).view(
            (end - start, *shape[1:])[: len(shape)]
        )

    def whole(self, name: str) -> Tensor:
        """A tensor in its shape."""
        shape = self._held[name].shape
        return self.elements(name, 0, math.prod(shape)).view(shape)

    @torch.no_grad()
    def fill(self, part: Part, name: str, through: torch.dtype | None = None) -> None:
        """Copy into a part what the files hold of it, in the part's own dtype.

        `through`: the values are first rounded to this dtype.
        """
        for low in range(part.start, part.end, _RUN):
            values = self.elements(name, low, min(low + _RUN, part.end))
            into = part.values[low - part.start :][: len(values)]
            into.copy_(values if through is None else values.to(through))

    def _add(self, path: Path, number: int) -> None:
        """Take up the header of a file."""
        try:
            with safe_open(path, "pt"):  # checks lengths and offsets against the file's size
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(length))
            parts = json.loads(header.pop("__metadata__", {}).get(PARTS, "{}"))
            places = {name: (int(start), tuple(shape)) for name, (start, shape) in parts.items()}
        except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
            raise self._fault(path, f"is damaged ({error})") from error
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ModelError(
                    str(path),
                    f"holds {name} in {entry['dtype']}, a type of quantised weights",
                    "write the model that it was quantised from",
                )
            start, shape = places.get(name, (0, entry["shape"]))
            offset = 8 + length + entry["data_offsets"][0]
            piece = _Piece(number, offset, start, start + math.prod(entry["shape"]))
            fresh = _Held(tuple(shape), DTYPES[entry["dtype"]], [])
            self._held.setdefault(name, fresh).pieces.append(piece)

    def _check_whole(self, name: str, held: _Held) -> None:
        """Do the pieces cover the tensor from its first to its last element, each element once?"""
        held.pieces.sort(key=lambda piece: piece.start)
        reached = 0
        for piece in held.pieces:
            if piece.start != reached:
                break
            reached = piece.end
        if reached != math.prod(held.shape) or reached != held.pieces[-1].end:
            raise self._fault(
                self.files[0].parent,
                f"holds elements up to {reached} of the {math.prod(held.shape)} of {name}; "
                "a file of another process is missing",
            )

    def _read(self, file: int, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptors[file], [view[done:]], offset + done)
            if count == 0:
                raise self._fault(self.files[file], "became shorter while it was read")
            done += count


@contextmanager
def open_shards(folder: Path, stem: str) -> Iterator[TensorFiles]:
    """The tensors in the files of `stem` in a checkpoint's `folder`, whatever their number.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    files = shard_files(folder, stem)
    if not files:
        raise CheckpointError(f"{folder} holds no {stem}.safetensors")
    with TensorFiles(files, _of_checkpoint) as tensors:
        yield tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory: one, or those that its index names.

    Raises:
        ModelError: there are none, one is missing, or the weights are pickles.
    """
    index = folder / MODEL_INDEX
    if (folder / MODEL_WEIGHTS).is_file() and not index.is_file():
        return [folder / MODEL_WEIGHTS]
    if not index.is_file():
        pickled = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
        if pickled:
            raise ModelError(
                str(folder),
                f"holds its weights as pickles ({pickled[0]}), which run code when they are loaded",
                "convert them to safetensors where you trust them",
            )
        raise ModelError(str(folder), f"holds neither {MODEL_WEIGHTS} nor {MODEL_INDEX}", REMEDY)
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(str(index), f"cannot be read ({error})", REMEDY) from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(str(index), f"names {name}, which is not a file beside it", REMEDY)
        if not (folder / name).is_file():
            raise ModelError(str(folder), f"lacks {name}, which its index names", REMEDY)
    return [folder / name for name in names]


def open_model(folder: Path) -> TensorFiles:
    """All tensors of a model directory.

    Raises:
        ModelError: see `weight_files` and `TensorFiles`; or a tensor that the index names is in
            none of its files.
    """
    tensors = TensorFiles(weight_files(folder))
    if (folder / MODEL_INDEX).is_file():
        named = read_json(folder / MODEL_INDEX)["weight_map"]
        if missing := sorted(set(named) - set(tensors.shapes)):
            tensors.__exit__()
            raise ModelError(str(folder), f"lacks {missing[0]}, which its index names", REMEDY)
    return tensors
