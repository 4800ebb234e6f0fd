"""Read tensors that lie in one or several safetensors files, whole or in parts.

    model.safetensors                     of one process
    model-00001-of-00004.safetensors      of the first of four

Whoever reads asks for any range of any tensor, whatever the number of files. Base models in the
format of Hugging Face are read by the same functions.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raytune_ft.errors import CheckpointError, ModelError
from raytune_ft.layout import MODEL_INDEX, MODEL_WEIGHTS
from raytune_ft.tensors.write import DTYPES, PARTS, Part

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
    if (folder / MODEL_INDEX).is_file():
        named = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))["weight_map"]
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
