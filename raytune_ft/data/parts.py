"""Tokenised examples on their way from the rows to the splits: a file for each piece of a source.

A part is written and read block by block, so that neither needs more memory where it is longer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raytune_ft.data.arrays import BLOCK_TOKENS, Indices, empty_on_disk, items
from raytune_ft.data.arrow import numbers, texts, values_of
from raytune_ft.data.formats import Example
from raytune_ft.data.split import PARTS, Column, Mask, TokenIds
from raytune_ft.errors import RunFailed

BLOCK_EXAMPLES = 2**14
SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("label_mask", pa.large_list(pa.uint8())),
        ("tokens", pa.int32()),
        ("row", pa.int64()),
        ("print", pa.binary(16)),
        ("prompt", pa.binary(16)),
        ("answers", pa.binary(17)),
        ("origin", pa.binary()),
        ("more", pa.string()),
    ]
)
"""A row for each example. `row`: that of its piece. `print`: a hash of ids and mask. `answers`: of
a pair, a hash of both answers in any order, and which of them is chosen. `more`: columns, labels
and difficulty in JSON, if it has any.
"""


def fingerprint(ids: TokenIds, mask: Mask) -> bytes:
    """Equal for equal ids and label mask."""
    return hashlib.blake2b(ids.tobytes() + mask.tobytes(), digest_size=16).digest()


class PartWriter:
    """Writes a part; to be used as a context manager."""

    def __init__(self, path: Path) -> None:
        self.blocks: list[int] = []
        self._path, self._stack = path, ExitStack()
        self._held: list[tuple[int, Example]] = []
        self._tokens = 0

    def __enter__(self) -> PartWriter:
        sink = self._stack.enter_context(pa.OSFile(str(self._path), "wb"))
        self._file = self._stack.enter_context(pa.ipc.new_file(sink, SCHEMA))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._flush()
        self._stack.close()

    def add(self, row: int, examples: Sequence[Example]) -> None:
        """The examples of a row; rows come in ascending order."""
        self._held += ((row, one) for one in examples)
        self._tokens += sum(len(one.ids) for one in examples)
        if self._tokens >= BLOCK_TOKENS or len(self._held) >= BLOCK_EXAMPLES:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        rows = [row for row, _ in self._held]
        examples = [one for _, one in self._held]
        lengths_n = np.array([len(one.ids) for one in examples], np.int32)
        offsets = numbers(np.concatenate([[0], np.cumsum(lengths_n, dtype=np.int64)]))
        ids = np.concatenate([one.ids for one in examples]).astype(np.int32, copy=False)
        mask = np.concatenate([one.mask for one in examples]).view(np.uint8)
        columns: list[pa.Array | list[bytes | None]] = [
            pa.LargeListArray.from_arrays(offsets, numbers(ids)),
            pa.LargeListArray.from_arrays(offsets, numbers(mask)),
            numbers(lengths_n),
            numbers(np.array(rows, np.int64)),
            [fingerprint(one.ids, one.mask) for one in examples],
            [one.prompt.ljust(16, b"\0") for one in examples],
            [_answers(one) for one in examples],
            [one.origin.encode(errors="surrogateescape") for one in examples],
            [_more(one) for one in examples],
        ]
        arrays = [
            texts(one, field.type) if isinstance(one, list) else one
            for one, field in zip(columns, SCHEMA, strict=True)
        ]
        self._file.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        self.blocks.append(len(examples))
        self._held, self._tokens = [], 0


def _answers(example: Example) -> bytes | None:
    if PARTS not in example.columns:
        return None
    chosen, rejected = (
        hashlib.blake2b(ids.tobytes(), digest_size=16).digest() for ids, _ in example.sequences
    )
    both = b"".join(sorted((chosen, rejected)))
    return hashlib.blake2b(both, digest_size=16).digest() + bytes([chosen < rejected])


def _more(example: Example) -> bytes | None:
    found: dict[str, Any] = {}
    if example.columns:
        found["columns"] = dict(example.columns)
    if example.labels is not None:
        found["labels"] = example.labels
    if example.difficulty:
        found["difficulty"] = example.difficulty
    return json.dumps(found).encode() if found else None


@dataclass(frozen=True)
class Part:
    """The file of a part: its rows, and the examples of each of its blocks."""

    path: Path
    source: int
    rows: int
    blocks: tuple[int, ...]


class Examples:
    """The examples of several parts, one after another; `source` of a part numbers its source.
    Arrays that are as long as they are lie in `scratch`.
    """

    def __init__(self, parts: Sequence[Part], scratch: Path) -> None:
        self.parts, self.scratch = parts, scratch
        places = [(part, n) for part in parts for n in range(len(part.blocks))]
        self._places = places
        counts = [part.blocks[n] for part, n in places]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._loaded: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._first[-1])

    def empty(self, length: int, dtype: Any) -> npt.NDArray[Any]:
        """Zeros in `scratch`."""
        return empty_on_disk(self.scratch, length, dtype)

    def blocks(self, *names: str) -> Iterator[tuple[slice, Part, Any]]:
        """(which examples, their part, these columns of them), in order."""
        for number, (part, block) in enumerate(self._places):
            span = slice(int(self._first[number]), int(self._first[number + 1]))
            yield span, part, _read(part.path, block, names)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """[n], tokens of each example."""
        lengths_n = self.empty(len(self), np.int32)
        for span, _, found in self.blocks("tokens"):
            lengths_n[span] = values_of(found["tokens"])
        return lengths_n

    @cached_property
    def sources(self) -> npt.NDArray[np.int16]:
        """[n], the number of each example's source."""
        sources_n = self.empty(len(self), np.int16)
        for number, (part, _) in enumerate(self._places):
            sources_n[self._first[number] : self._first[number + 1]] = part.source
        return sources_n

    @cached_property
    def rows(self) -> Indices:
        """[n], the number of each example's row among those of all parts, unusable ones too."""
        rows_n, before = self.empty(len(self), np.int64), {}
        total = 0
        for part in self.parts:
            before[part.path] = total
            total += part.rows
        for span, part, found in self.blocks("row"):
            rows_n[span] = values_of(found["row"]) + before[part.path]
        return rows_n

    def hashes(self, name: str) -> Iterator[tuple[slice, npt.NDArray[np.uint8]]]:
        """(which examples, `[n, width]` bytes) of a column of hashes that none of them lacks."""
        width = SCHEMA.field(name).type.byte_width
        for span, _, found in self.blocks(name):
            raw = np.frombuffer(found[name].buffers()[1], np.uint8)
            start = found[name].offset * width
            yield span, raw[start : start + width * len(found)].reshape(-1, width)

    def more(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """(which example, its origin, columns and so on) of those that have any."""
        for span, _, found in self.blocks("origin", "more"):
            if found["more"].null_count == len(found):
                continue
            pairs = zip(found["origin"].to_pylist(), found["more"].to_pylist(), strict=True)
            for number, (origin, text) in enumerate(pairs, start=span.start):
                if text is not None:
                    yield number, origin.decode(errors="surrogateescape"), json.loads(text)

    def tokens_of(self, chosen: Indices) -> tuple[TokenIds, Mask]:
        """Ids and label mask of these examples, which are at least one, in this order."""
        lengths = self.lengths[chosen]
        ends = np.cumsum(lengths, dtype=np.int64)
        ids, mask = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.uint8)
        blocks = np.searchsorted(self._first, chosen, side="right") - 1
        for block in np.unique(blocks):
            places = np.flatnonzero(blocks == block)
            found = self._tokens(int(block))
            offsets = values_of(found["input_ids"].offsets)
            begins = offsets[chosen[places] - self._first[block]]
            source = items(begins, lengths[places])
            target = items(ends[places] - lengths[places], lengths[places])
            ids[target] = values_of(found["input_ids"].values)[source]
            mask[target] = values_of(found["label_mask"].values)[source]
        return ids, mask.view(np.bool_)

    def _tokens(self, number: int) -> Any:
        if self._loaded[0] != number:
            part, block = self._places[number]
            self._loaded = (number, _read(part.path, block, ("input_ids", "label_mask")))
        return self._loaded[1]


def _read(path: Path, block: int, names: Sequence[str]) -> Any:
    """Columns of a block by name. The file is not mapped: a process pays for what it holds."""
    chosen = sorted(SCHEMA.get_field_index(name) for name in names)
    options = pa.ipc.IpcReadOptions(included_fields=chosen)
    try:
        with pa.OSFile(str(path), "rb") as file:
            return pa.ipc.open_file(file, options=options).get_batch(block)
    except (OSError, pa.ArrowException) as error:
        raise RunFailed(f"{path} cannot be read as a part of the tokens: {error}") from error


def columns_of(
    examples: Examples, absent: dict[str, float]
) -> tuple[dict[str, Column], npt.NDArray[np.float64]]:
    """The columns of all examples by name, and their difficulty; `absent` is what one has that
    lacks a column, by default 0.
    """
    columns: dict[str, Column] = {}
    difficulty = examples.empty(len(examples), np.float64)
    for number, _, found in examples.more():
        difficulty[number] = found.get("difficulty", 0.0)
        for name, values in found.get("columns", {}).items():
            if name not in columns:
                flat = examples.empty(len(examples) * len(values), np.float32)
                columns[name] = flat.reshape(-1, len(values))
                if name in absent:
                    columns[name][:] = absent[name]
            columns[name][number] = values
    return columns, difficulty
