"""The weights of a model directory, read row by row and never mapped.

Pages of a mapped file count as memory of the process that read them; what is read here is in memory
for as long as its caller holds it and no longer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raytune_ft.errors import ModelError
from raytune_ft.tensors.write import DTYPES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
REMEDY = "write a directory with all of its safetensors files"


@dataclass(frozen=True)
class Held:
    """A tensor in a file: its bytes begin at `offset`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: int
    offset: int

    @property
    def bytes(self) -> int:
        """Of all its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """Tensors of several files by name; a context manager that keeps the files open."""

    def __init__(self, files: Sequence[Path]) -> None:
        """
        Raises:
            ModelError: a file is missing, cut short or no safetensors file.
        """
        self.files = list(files)
        self._stack = ExitStack()
        self._descriptors: list[int] = []
        self.held: dict[str, Held] = {}
        try:
            for number, path in enumerate(self.files):
                self.held |= _header(path, number)
                self._descriptors.append(os.open(path, os.O_RDONLY))
                self._stack.callback(os.close, self._descriptors[-1])
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By name, in the order of the files."""
        return {name: held.shape for name, held in self.held.items()}

    def dtype(self, name: str) -> torch.dtype:
        """As it lies in its file."""
        return self.held[name].dtype

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end` of a tensor, in the file's dtype; a scalar has one row."""
        held = self.held[name]
        row = math.prod(held.shape[1:])
        shape = (end - start, *held.shape[1:]) if held.shape else ()
        data = torch.empty(shape, dtype=held.dtype)
        if data.numel():
            view = memoryview(data.view(-1).view(torch.uint8).numpy().data)
            offset = held.offset + start * row * held.dtype.itemsize
            _read(self._descriptors[held.file], view, offset, self.files[held.file])
        return data

    def whole(self, name: str) -> Tensor:
        """A tensor in its shape."""
        shape = self.held[name].shape
        return self.rows(name, 0, shape[0] if shape else 1)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory: one, or those that its index names.

    Raises:
        ModelError: there are none, one is missing, or the weights are pickles.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file() and not index.is_file():
        return [folder / SINGLE]
    if not index.is_file():
        pickled = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
        if pickled:
            raise ModelError(
                str(folder),
                f"holds its weights as pickles ({pickled[0]}), which run code when they are loaded",
                "convert them to safetensors where you trust them",
            )
        raise ModelError(str(folder), f"holds neither {SINGLE} nor {INDEX}", REMEDY)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(str(index), f"cannot be read ({error})", REMEDY) from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(str(index), f"names {name}, which is no file beside it", REMEDY)
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
    if (folder / INDEX).is_file():
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if missing := sorted(set(named) - set(tensors.held)):
            tensors.__exit__()
            raise ModelError(str(folder), f"lacks {missing[0]}, which its index names", REMEDY)
    return tensors


def _header(path: Path, number: int) -> dict[str, Held]:
    try:
        with safe_open(path, "pt"):  # checks lengths and offsets against the file's size
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(str(path), f"is damaged ({error})", REMEDY) from error
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ModelError(
                str(path),
                f"holds {name} in {entry['dtype']}, a type of quantised weights",
                "write the model that it was quantised from",
            )
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        found[name] = Held(shape, dtype, number, 8 + length + entry["data_offsets"][0])
    return found


def _read(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise ModelError(str(path), "became shorter while it was read", REMEDY)
        done += count
