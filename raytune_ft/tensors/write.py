"""Write safetensors files (the format: a length, a JSON header, the bytes of every tensor).

The library's own writer holds the GIL until the last byte is on the disk and needs every tensor at
once. This one lets other threads run, holds one tensor in memory at a time, and hashes the bytes as
it writes them, so that no file is read again.
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
    """One contiguous range of a tensor in row-major order.

    Every sharding in use cuts tensors this way: fsdp between rows, ZeRO anywhere. `values` `[n]` is
    a view of the live storage, so copying into it changes the weight that is trained. `shape` is
    the whole tensor's. `writes`: this rank saves the range where several ranks hold it.
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor
    writes: bool = True

    @property
    def end(self) -> int:
        """The first element after this part."""
        return self.start + self.values.numel()

    @property
    def whole(self) -> bool:
        """Whether the part is the whole tensor."""
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
    """Takes a count of written bytes and does nothing."""


@dataclass(frozen=True)
class Entry:
    """A tensor's line in the header."""

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

    The file has reached the disk on return. `wrote` receives the number of bytes after each write.
    Raises OSError where the file cannot be written.
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
                    os.fsync(file.fileno())  # in portions, so that no single fsync takes minutes
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
    """The file `root/relative` with the parts that a process holds; empty parts are left out.

    Whole tensors keep their shape. Others are flat, and the metadata key "parts" holds as JSON
    `{name: [first element, shape of the whole tensor]}`.
    """
    held = {name: part for name, part in parts.items() if part.whole or part.values.numel()}
    places = {n: [part.start, list(part.shape)] for n, part in held.items() if not part.whole}
    entries = [
        Entry(name, part.values.dtype, part.shape if part.whole else (part.values.numel(),))
        for name, part in held.items()
    ]
    values = (part.values for part in held.values())
    return write_tensors(root, relative, entries, values, {PARTS: json.dumps(places)}, wrote)
