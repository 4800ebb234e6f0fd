"""Write safetensors files (the format: a length, a JSON header, the bytes of every tensor).

The library's own writer holds the interpreter's lock until the last byte is on the disk, and wants
every tensor at once. Here others may run meanwhile, one tensor is in memory at a time, and the
hash is that of the bytes on their way, so that no file is read again for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raytune_ft.records import FileRecord


@dataclass(frozen=True)
class Part:
    """One unbroken range of a tensor that is read row by row.

    Every sharding in use cuts tensors so: fsdp between rows, ZeRO anywhere. `values` `[n]` is a
    view of the live storage; what is copied into it is trained with. `shape` is the whole
    tensor's. `writes`: this rank saves the range, where several hold the same.
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor
    writes: bool = True

    @property
    def end(self) -> int:
        """The first element that this part does not have."""
        return self.start + self.values.numel()

    @property
    def whole(self) -> bool:
        """Is it all of the tensor?"""
        return self.values.numel() == math.prod(self.shape)


PARTS = "parts"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_CHUNK = 1 << 24  # bytes written and hashed at a time
_FLUSH = 1 << 30


def ignore(count: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Entry:
    """Name, type and shape of a tensor, which the header holds before its bytes come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_tensors(
    root: Path,
    relative: str,
    entries: Iterable[Entry],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
    wrote: Callable[[int], None] = ignore,
) -> FileRecord:
    """The file `root/relative` with these entries and, in the same order, their tensors.

    It has reached the disk on return; `wrote` is told of bytes on their way there. Raises OSError
    where it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for entry in entries:
        size = math.prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, length = hashlib.sha256(), 0
    with (root / relative).open("wb", buffering=0) as file:
        for block in (len(text).to_bytes(8, "little"), text):
            length += _write(file.fileno(), block, digest)
        for tensor in tensors:
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
            for start in range(0, len(flat), _CHUNK):
                count = _write(file.fileno(), flat[start : start + _CHUNK].data, digest)
                if length // _FLUSH < (length + count) // _FLUSH:
                    os.fsync(file.fileno())  # a little at a time, so that none takes minutes
                length += count
                wrote(count)
        assert length == 8 + len(text) + offset, "the tensors are not those of the entries"
        os.fsync(file.fileno())
    return FileRecord(relative, length, digest.hexdigest())


def _write(descriptor: int, block: bytes | memoryview, digest: hashlib._Hash) -> int:
    digest.update(block)
    view, written = memoryview(block), 0
    while written < len(view):
        written += os.write(descriptor, view[written:])
    return written


def write_parts(
    root: Path, relative: str, parts: Mapping[str, Part], wrote: Callable[[int], None] = ignore
) -> FileRecord:
    """What a process holds of some tensors; parts of nothing are left out.

    Whole tensors keep their shape. Others are flat, and the file's metadata says under "parts",
    as JSON, what they are of: `{name: [first element, shape of all]}`.
    """
    held = {name: part for name, part in parts.items() if part.whole or part.values.numel()}
    places = {n: [part.start, list(part.shape)] for n, part in held.items() if not part.whole}
    entries = [
        Entry(name, part.values.dtype, part.shape if part.whole else (part.values.numel(),))
        for name, part in held.items()
    ]
    values = (part.values for part in held.values())
    return write_tensors(root, relative, entries, values, {PARTS: json.dumps(places)}, wrote)
