"""The tokenised examples of one split: three flat arrays over a memory-mapped Arrow file.

Every worker and every trial of a machine maps the same file, so the tokens are in memory once.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raytune_ft.data.arrays import spans
from raytune_ft.data.arrow import numbers, values_of
from raytune_ft.errors import RunFailed

TokenIds = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Column = npt.NDArray[np.float32]

PARTS = "parts"
"""The column of a split that holds the lengths of the sequences of its examples."""

SCHEMA = pa.schema(
    [("input_ids", pa.large_list(pa.int32())), ("label_mask", pa.large_list(pa.uint8()))]
)


@dataclass(frozen=True, eq=False)
class TokenizedSplit:
    """`n` examples of `tokens` tokens in all.

    Attributes:
        input_ids: [tokens], the examples one after another.
        label_mask: [tokens], True where the token is a label, that is, where predicting it
            carries loss. It sits on the predicted token and not on the one before it.
        offsets: [n + 1], example `i` is `input_ids[offsets[i]:offsets[i + 1]]`.
        columns: name -> [n, width], other numbers of an example, such as its weight. Where
            examples are of several sequences, such as a pair of answers, `parts` has the tokens of
            each: the model sees them one by one, and a micro-batch takes all or none. The first
            token of a sequence is no label.
        label_columns: name -> [label tokens], a number for each label token, such as its
            log-probability under another model; not saved in the file.
        partners: another split of as many examples, for objectives that need one beside each of
            these; not saved in the file.
        sources: source names behind the numbers of the column `source`; not saved in the file.
    """

    input_ids: TokenIds
    label_mask: Mask
    offsets: npt.NDArray[np.int64]
    columns: Mapping[str, Column] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    label_columns: Mapping[str, Column] = field(default_factory=dict)
    partners: TokenizedSplit | None = None

    @classmethod
    def from_examples(
        cls,
        examples: Sequence[tuple[TokenIds, Mask]],
        columns: Mapping[str, Column] | None = None,
    ) -> TokenizedSplit:
        """Join examples, each of them (ids, mask) of one length."""
        lengths = np.array([len(ids) for ids, _ in examples], dtype=np.int64)
        return cls(
            input_ids=np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in examples)]),
            label_mask=np.concatenate([np.zeros(0, np.bool_), *(mask for _, mask in examples)]),
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            columns=columns or {},
        )

    @classmethod
    def joined(cls, splits: Sequence[TokenizedSplit]) -> TokenizedSplit:
        """The examples of splits with the same columns, one split after another. A label column
        that one of them lacks is NaN there.
        """
        names = dict.fromkeys(name for split in splits for name in split.label_columns)

        def labels(name: str) -> Column:
            return np.concatenate(
                [
                    split.label_columns.get(name, np.full(split.label_counts.sum(), np.nan))
                    for split in splits
                ]
            )

        return cls(
            input_ids=np.concatenate([split.input_ids for split in splits]),
            label_mask=np.concatenate([split.label_mask for split in splits]),
            offsets=np.cumsum(np.concatenate([[0], *(split.lengths for split in splits)])),
            columns={
                name: np.concatenate([split.columns[name] for split in splits])
                for name in splits[0].columns
            },
            label_columns={name: labels(name) for name in names},
        )

    @classmethod
    def open(cls, path: Path) -> TokenizedSplit:
        """Map the file that `write` made. Its pages are read on first use.

        Raises:
            RunFailed: the file is missing, cut short or something else.
        """
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            own = list(reader.schema)[len(SCHEMA) :]
            if list(reader.schema)[: len(SCHEMA)] != list(SCHEMA) or reader.num_record_batches != 1:
                raise RunFailed(f"{path} is an Arrow file, but not a token cache")
            ids, mask, *columns = reader.get_batch(0).columns
        except (OSError, pa.ArrowException) as error:
            raise RunFailed(f"{path} cannot be read as a token cache: {error}") from error
        return cls(
            input_ids=values_of(ids.values),
            label_mask=values_of(mask.values).view(np.bool_),
            offsets=values_of(ids.offsets),
            columns={
                field.name: values_of(column.values).reshape(len(column), field.type.list_size)
                for field, column in zip(own, columns, strict=True)
            },
        )

    def write(self, path: Path) -> None:
        """Write one Arrow IPC file with a row for each example."""
        write_split(path, self.offsets, self.columns, [(self.input_ids, self.label_mask)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, i: int) -> tuple[TokenIds, Mask]:
        """Views of the ids and the label mask of example `i`."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.input_ids[span], self.label_mask[span]

    def sequence(self, number: int) -> tuple[TokenIds, Mask]:
        """Views of the ids and the label mask of a sequence, `i * parts + p` for example `i`."""
        span = slice(self.part_offsets[number], self.part_offsets[number + 1])
        return self.input_ids[span], self.label_mask[span]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[n], tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
    def label_counts(self) -> npt.NDArray[np.int64]:
        """[n], tokens of each example that carry loss."""
        counts = np.empty(len(self), np.int64)
        for at in spans(len(self)):
            counts[at] = self.labels_at(at).sum(1)
        return counts

    def labels_at(self, at: slice) -> npt.NDArray[np.int64]:
        """[examples, parts], tokens of each sequence that carry loss, of a span of examples.

        The first token never counts, whatever its mask says: no token comes before it.
        """
        offsets = self.part_offsets[at.start * self.parts : at.stop * self.parts + 1]
        mask, offsets = self.label_mask[offsets[0] : offsets[-1]], offsets - offsets[0]
        counts = np.diff(_labels_before(mask, offsets))
        filled = np.diff(offsets) > 0
        counts[filled] -= mask[offsets[:-1][filled]]
        return counts.reshape(-1, self.parts)

    def labels_of(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """`label_counts[indices]`, without those of all others."""
        counts = self.part_labels_of(parts_of(indices, self.parts))
        summed: npt.NDArray[np.int64] = counts.reshape(-1, self.parts).sum(1)
        return summed

    def part_labels_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The label tokens of these sequences."""
        counts = [np.count_nonzero(self.sequence(number)[1][1:]) for number in numbers.tolist()]
        return np.array(counts, np.int64)

    @property
    def parts(self) -> int:
        """Sequences of each example."""
        lengths_nP = self.columns.get(PARTS)
        return 1 if lengths_nP is None else lengths_nP.shape[1]

    @cached_property
    def part_offsets(self) -> npt.NDArray[np.int64]:
        """[n * parts + 1], sequence `p` of example `i` begins at `[i * parts + p]`."""
        lengths_nP = self.columns.get(PARTS)
        if lengths_nP is None:
            return self.offsets
        offsets = np.zeros(lengths_nP.size + 1, np.int64)
        np.cumsum(lengths_nP.reshape(-1), dtype=np.int64, out=offsets[1:])
        return offsets

    @cached_property
    def part_labels(self) -> npt.NDArray[np.int64]:
        """[n * parts + 1], the label tokens before each sequence."""
        found = np.zeros(len(self) * self.parts + 1, np.int64)
        for at in spans(len(self)):
            start, stop = at.start * self.parts, at.stop * self.parts
            found[start + 1 : stop + 1] = found[start] + np.cumsum(self.labels_at(at))
        return found

    @cached_property
    def longest_parts(self) -> npt.NDArray[np.int64]:
        """[n], tokens of the longest sequence of each example."""
        longest_n: npt.NDArray[np.int64] = np.diff(self.part_offsets).reshape(-1, self.parts).max(1)
        return longest_n

    def part_lengths(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[int]:
        """Tokens of each sequence of these examples, one example after another."""
        offsets, parts = self.part_offsets, self.parts
        numbers = parts_of(indices, parts)
        lengths: list[int] = (offsets[numbers + 1] - offsets[numbers]).tolist()
        return lengths

    @cached_property
    def source_numbers(self) -> npt.NDArray[np.int64] | None:
        """[n], the number of each example's source; None without a column `source`."""
        column = self.columns.get("source")
        return None if column is None else column[:, 0].astype(np.int64)

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: equal for equal examples in the same order."""
        digest = _digest_of(self.offsets)
        for array in (self.input_ids, self.label_mask):
            digest.update(np.ascontiguousarray(array).data)
        _add_columns(digest, self.columns)
        return digest.hexdigest()


def length_range(offsets: npt.NDArray[np.int64]) -> tuple[int, int]:
    """The shortest and the longest of what lies between these places, two or more."""
    shortest, longest = int(offsets[1] - offsets[0]), 0
    for at in spans(len(offsets) - 1):
        lengths = np.diff(offsets[at.start : at.stop + 1])
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
    return shortest, longest


def _digest_of(offsets: npt.NDArray[np.int64]) -> Any:
    digest = hashlib.sha256((len(offsets) - 1).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(offsets).data)
    return digest


def _add_columns(digest: Any, columns: Mapping[str, Column]) -> None:
    for name, column in sorted(columns.items()):
        digest.update(f"{name} {column.shape[1]}".encode())
        digest.update(np.ascontiguousarray(column).data)


def _labels_before(mask: Mask, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The label tokens before each of these places, which ascend. A running count of every token
    would take 8 bytes for each.
    """
    found, total, block = np.empty(len(places), np.int64), 0, 2**22
    for start in range(0, max(len(mask), 1), block):
        running = np.concatenate([[0], np.cumsum(mask[start : start + block])])
        first, last = np.searchsorted(places, (start, start + len(running) - 1))
        last = len(places) if start + block >= len(mask) else last
        found[first:last] = total + running[places[first:last] - start]
        total += int(running[-1])
    return found


class _Holes:
    """A file to write to in which large buffers are left out; `places` says where they belong.

    Arrow hands over every buffer as it is. So a file of one batch, which alone can be mapped as one
    flat array, is laid out without holding the tokens, and these are written afterwards.
    """

    closed = False

    def __init__(self, file: BinaryIO, addresses: Sequence[int]) -> None:
        self._file, self._addresses = file, addresses
        self.places: dict[int, int] = {}

    def write(self, data: Any) -> int:
        address = getattr(data, "address", None)
        if address in self._addresses and len(data):
            self.places[self._addresses.index(address)] = self._file.tell()
            self._file.seek(len(data), os.SEEK_CUR)
        else:
            self._file.write(data)
        return len(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True


def write_split(
    path: Path,
    offsets: npt.NDArray[np.int64],
    columns: Mapping[str, Column],
    blocks: Iterable[tuple[TokenIds, Mask]],
) -> str:
    """Write a split whose ids and masks come in blocks, of any size. Its `sha256`."""
    total = int(offsets[-1])
    empty = [_untouched(total, np.int32), _untouched(total, np.uint8)]
    arrays = [pa.LargeListArray.from_arrays(numbers(offsets), numbers(one)) for one in empty]
    schema = SCHEMA
    for name, values in columns.items():
        flat = numbers(np.ascontiguousarray(values, np.float32).reshape(-1))
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
        schema = schema.append(pa.field(name, arrays[-1].type))
    digest = _digest_of(offsets)
    with path.open("w+b") as file:
        holes = _Holes(file, [one.ctypes.data for one in empty])
        with (
            pa.PythonFile(holes, mode="w") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        at_ids, at_mask = holes.places.get(0, 0), holes.places.get(1, 0)
        mask_begins = at_mask
        for ids, mask in blocks:
            raw = np.ascontiguousarray(ids).data
            digest.update(raw)
            file.seek(at_ids)
            at_ids += file.write(raw)
            file.seek(at_mask)
            at_mask += file.write(np.ascontiguousarray(mask).data)
        assert at_mask - mask_begins == total
        file.seek(mask_begins)
        while left := at_mask - file.tell():
            digest.update(file.read(min(left, 2**20)))
    _add_columns(digest, columns)
    return str(digest.hexdigest())


def _untouched(count: int, dtype: Any) -> npt.NDArray[Any]:
    """Zeros that take address space and no memory, because nothing reads or writes them."""
    size = max(count * np.dtype(dtype).itemsize, 1)
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    return np.frombuffer(space, dtype, count)


def first_answer(mask: Mask) -> slice:
    """The first run of label tokens, before which is the prompt."""
    start = int(np.argmax(mask))
    return slice(start, start + int(np.argmin(np.append(mask[start:], False))))


def parts_of(indices: Sequence[int] | npt.NDArray[np.int64], parts: int) -> npt.NDArray[np.int64]:
    """The numbers of all sequences of these examples, where each example has `parts` of them."""
    chosen = np.asarray(indices, np.int64)
    return (chosen[:, None] * parts + np.arange(parts)).reshape(-1)
