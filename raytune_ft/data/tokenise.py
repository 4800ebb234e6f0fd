"""From rows to examples: rows are encoded, cut to length, dropped or counted as bad.

`make_part` does so for one piece of a source, in any process. What it counts is added up in the
order of the pieces, so that a report does not depend on how the rows were cut.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from raytune_ft.config.data import FORMATS, DataConfig, SourceConfig, difficulty_column
from raytune_ft.data.formats import (
    WEIGHT,
    Encoder,
    Example,
    columns_of,
    encode_rows,
    optional_columns,
)
from raytune_ft.data.formats.classification import read_labels
from raytune_ft.data.formats.example import is_rated
from raytune_ft.data.formats.rationale import RATIONALE
from raytune_ft.data.parts import Part, PartWriter
from raytune_ft.data.report import SourceReport, facts
from raytune_ft.data.rows import BadRow, Row, number_of
from raytune_ft.data.sources import BATCH_ROWS, Piece, Source
from raytune_ft.data.split import PARTS
from raytune_ft.errors import DataError
from raytune_ft.files import fsync, read_json
from raytune_ft.records import to_json

EXAMPLE_BYTES = 100
"""About what a part holds of an example beside its ids and its mask."""

EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that a column may have in a row that has nothing there."""


@dataclass
class Tally:
    """Counts of a piece, or of a source.

    Attributes:
        lacking: the length of the longest row that is bad because its labels lie past the limit.
        weighted: an example weighs more than 0.
        rated: answers are compared with others to the same prompt.
        seen: the columns that a row has, for each shard; see `Source.rows_of`.
        blocks: the examples of each block of the part.
    """

    rows: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: dict[str, str] = field(default_factory=dict)
    usable: int = 0
    truncated: int = 0
    dropped: int = 0
    longest: int = 0
    lacking: int = 0
    values: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    first_lost: dict[str, str] = field(default_factory=dict)
    lossy: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    label_tokens: int = 0
    weighted: bool = False
    rated: bool = False
    seen: dict[str, list[str]] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Counts of the rows that follow those of this one."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif each.name == "seen":
                for shard, columns in theirs.items():
                    mine[shard] = list(dict.fromkeys([*mine.get(shard, ()), *columns]))
            elif isinstance(mine, dict):
                mine |= {key: value for key, value in theirs.items() if key not in mine}
            elif each.name in ("longest", "lacking", "weighted", "rated"):
                setattr(self, each.name, max(mine, theirs))
            else:
                setattr(self, each.name, mine + theirs)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(to_json(vars(self)))

    @classmethod
    def read(cls, path: Path) -> Tally:
        """The inverse of `write`."""
        tally = cls()
        for name, found in read_json(path).items():
            kept = Counter(found) if isinstance(getattr(tally, name), Counter) else found
            setattr(tally, name, kept)
        return tally

    def add_row(self, row: Row | BadRow, columns: Sequence[str] | None) -> None:
        """Counts the columns that have a value; `columns` of a row that holds only those read."""
        if columns is not None:
            self.values.update(columns)
        elif isinstance(row, Row):
            for name, value in row.values.items():
                if value not in EMPTY:
                    self.values[name] += 1

    def add_example(self, example: Example) -> None:
        self.lossy += bool(example.lost)
        for kind in example.lost:
            self.lost[kind] += 1
            self.first_lost.setdefault(kind, example.origin)
        for note in example.notes:
            self.notes[note] += 1
        for one in (example, *example.others):
            for end in one.ends:
                self.ends[str(end)] += 1

    def add_bad(self, row: BadRow) -> None:
        self.bad[row.cause] += 1
        self.first_bad.setdefault(row.cause, f"{row.origin}: {row.detail}")


@dataclass(frozen=True)
class Work:
    """Everything that the parts of a data set are made from; goes to every process once.

    Attributes:
        sources: each with the section whose format is known.
        folder: where the parts are written.
        kept: parts that are found there are taken; so they have to reach the disk.
    """

    sources: tuple[tuple[Source, SourceConfig], ...]
    data: DataConfig
    encoder: Encoder
    folder: Path
    kept: bool

    @cached_property
    def pieces(self) -> list[tuple[int, Piece]]:
        """(the number of its source, the piece), of each part."""
        return [(n, piece) for n, (opened, _) in enumerate(self.sources) for piece in opened.pieces]

    def text_bytes(self, numbers: Sequence[int]) -> int:
        """About how much text the parts of these numbers are made of."""
        return sum(self.pieces[number][1].bytes for number in numbers)

    def part(self, number: int) -> Part:
        """A part that was made."""
        tally = self.tally(number)
        source = self.pieces[number][0]
        return Part(self._file(number), source, tally.rows, tuple(tally.blocks))

    def tally(self, number: int) -> Tally:
        """The counts of a part that was made."""
        return Tally.read(self._file(number).with_suffix(".json"))

    def is_made(self, number: int) -> bool:
        """Whether a part is there; what was counted is written last."""
        return self._file(number).with_suffix(".json").is_file()

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.arrow"


def make_part(work: Work, number: int) -> None:
    """Tokenise a piece into a part, which appears when it is whole.

    Raises:
        DataError: the rows cannot be read, or one is refused.
    """
    source_number, piece = work.pieces[number]
    opened, source = work.sources[source_number]
    target, tally = work._file(number), Tally()
    with tempfile.TemporaryDirectory(
        dir=work.folder, prefix=".making-", ignore_cleanup_errors=True
    ) as folder:
        scratch = Path(folder)
        with PartWriter(scratch / "part.arrow") as part:
            for row, examples in _examples(
                opened, source, work.data, work.encoder, piece, tally, scratch
            ):
                part.add(row, examples)
        tally.blocks = part.blocks
        tally.write(scratch / "tally.json")
        for file, end in (("part.arrow", ".arrow"), ("tally.json", ".json")):
            if work.kept:
                fsync(scratch / file)
            os.replace(scratch / file, target.with_suffix(end))


def bytes_per_byte(
    opened: Source, source: SourceConfig, data: DataConfig, encoder: Encoder
) -> float:
    """About how many bytes of a part a byte of text gives, by the first rows of a source."""
    columns = set(_wanted(opened, source, data).values())
    with closing(opened.all_rows()) as rows:
        found = [row for row in islice(rows, BATCH_ROWS) if isinstance(row, Row)]
    rows_of = [row for row in found if columns <= row.values.keys()]
    text = sum(len(json.dumps(row.values, default=str, ensure_ascii=False)) for row in rows_of)
    tally, tokens, examples = Tally(), 0, 0
    for result in encode_rows(encoder, source, data.separator, rows_of):
        fitted = _fitted(result, opened.label, source, data, tally)
        for one in [] if isinstance(fitted, BadRow) else fitted:
            tokens += len(one.ids)
            examples += 1
    return (tokens * 5 + examples * EXAMPLE_BYTES) / max(text, 1)


def _wanted(opened: Source, source: SourceConfig, data: DataConfig) -> dict[str, str]:
    """Key -> column, of the columns that every row has to have."""
    column = _difficulty_column(opened, data)
    return columns_of(source) | ({} if column is None else {"data.curriculum.column": column})


def _difficulty_column(opened: Source, data: DataConfig) -> str | None:
    return difficulty_column(data) if opened.label.startswith("data.train") else None


def _examples(
    opened: Source,
    source: SourceConfig,
    data: DataConfig,
    encoder: Encoder,
    piece: Piece,
    tally: Tally,
    scratch: Path,
) -> Iterator[tuple[int, list[Example]]]:
    """(number of a usable row in the piece, its examples); `tally` counts all rows."""
    column, seen = _difficulty_column(opened, data), dict[str, None]()
    wanted, optional = _wanted(opened, source, data), optional_columns(source)
    rows = opened.rows_of(piece, wanted, optional, seen, scratch)
    while chunk := list(islice(rows, BATCH_ROWS)):
        results = encode_rows(encoder, source, data.separator, chunk)
        for number, (row, result) in enumerate(zip(chunk, results, strict=True), tally.rows):
            tally.add_row(row, opened.columns)
            rated = result if column is None else _rated(result, row, column)
            fitted = _fitted(rated, opened.label, source, data, tally)
            if isinstance(fitted, BadRow):
                tally.add_bad(fitted)
                continue
            if isinstance(result, Example):
                tally.add_example(result)
            tally.usable += bool(fitted)
            tally.tokens += sum(len(one.ids) for one in fitted)
            tally.label_tokens += sum(int(one.mask.sum()) for one in fitted)
            tally.weighted |= any(one.columns.get(WEIGHT, (1.0,))[0] > 0 for one in fitted)
            tally.rated |= any(map(is_rated, fitted))
            yield number, fitted
        tally.rows += len(chunk)
    tally.seen = {str(piece.shard): list(seen)}


def reported(
    opened: Source, source: SourceConfig, data: DataConfig, encoder: Encoder, tally: Tally
) -> SourceReport:
    """The report on all rows of a source.

    Raises:
        DataError: a column is absent, too many rows are bad, or no row is left.
    """
    wanted = _wanted(opened, source, data)
    seen: Mapping[int, list[str]] = {int(shard): found for shard, found in tally.seen.items()}
    opened.check_columns(wanted, seen)
    _refuse_bad(opened, data, tally)
    if source.example_weight is not None and not tally.weighted:
        rule = "gives every example the weight 0, which leaves nothing to train on"
        raise DataError(
            f"{opened.label}.example_weight={source.example_weight}", rule, "write another column"
        )
    read = {*wanted.values(), *optional_columns(source)}
    unread = {name: count for name, count in tally.values.items() if name not in read}
    return SourceReport(
        name=opened.name,
        format=source.format,
        sha256=opened.sha256,
        rows=tally.rows,
        usable=tally.usable,
        bad=dict(sorted(tally.bad.items())),
        first_bad=tally.first_bad,
        truncated=tally.truncated,
        dropped=tally.dropped,
        longest=tally.longest,
        tokens=tally.tokens,
        label_tokens=tally.label_tokens,
        unread={} if FORMATS[source.format].prompts else unread,
        lost=dict(sorted(tally.lost.items())),
        first_lost=tally.first_lost,
        notes={name: count for name, count in sorted(tally.notes.items()) if count},
        ends=_end_words(tally.ends, encoder),
    )


def _rated(result: Example | BadRow, row: Row | BadRow, column: str) -> Example | BadRow:
    """With the difficulty from `column`, a number, which some formats hold as text."""
    if isinstance(result, BadRow) or isinstance(row, BadRow):
        return result
    number = number_of(row.values[column])
    if number is None:
        return BadRow(row.origin, "bad_difficulty", f"{column!r} is not a number")
    others = tuple(replace(other, difficulty=number) for other in result.others)
    return replace(result, difficulty=number, others=others)


def _fitted(
    result: Example | BadRow, label: str, source: SourceConfig, data: DataConfig, tally: Tally
) -> list[Example] | BadRow:
    """The examples of a row within `data.max_length`; empty if the row is too long."""
    if isinstance(result, BadRow):
        return result
    all_of_it = [result]
    if result.others:
        all_of_it = [replace(result, others=()), *result.others]
    longest = max(len(ids) for one in all_of_it for ids, _ in one.sequences)
    limit = data.max_length
    tally.longest = max(tally.longest, longest)
    if longest > limit:
        if data.chunk is not None and FORMATS[source.format].documents:
            return chunks(result, limit, data.chunk.overlap)
        if data.too_long == "error":
            raise DataError(
                f"{label}: {result.origin}",
                f"has {longest} tokens, over data.max_length={limit}",
                f"shorten it, write data.max_length={longest}, or data.too_long=truncate or drop",
            )
        if data.too_long == "drop":
            tally.dropped += 1
            return []
    if result.labels is not None:
        read = read_labels(result, data)
        if isinstance(read, BadRow):
            return read
        all_of_it = [read]
    elif not FORMATS[source.format].prompts:
        learnt = [one for one in all_of_it if all(mask[:limit].any() for _, mask in one.sequences)]
        # An answer and its rationale belong together; of a conversation some turns may be too far.
        if not learnt or (RATIONALE in result.columns and len(learnt) < len(all_of_it)):
            if not all(mask.any() for one in all_of_it for _, mask in one.sequences):
                return BadRow(result.origin, "no_label_token", "no token carries loss")
            tally.lacking = max(tally.lacking, longest)
            where = f"within data.max_length={limit}, and the row has {longest}"
            return BadRow(result.origin, "no_label_token", f"no token carries loss {where}")
        tally.notes["turns_too_far"] += len(learnt) < len(all_of_it)
        all_of_it = learnt
    tally.truncated += longest > limit
    fitted = [_cut(one, limit) for one in all_of_it]
    if PARTS in result.columns and _alike(fitted[0]):
        return BadRow(result.origin, "same_answers", "both answers have the same tokens")
    return fitted


def _alike(pair: Example) -> bool:
    (one, _), (other, _) = pair.sequences
    return np.array_equal(one, other)


def _cut(example: Example, limit: int) -> Example:
    """Cuts the end off each sequence, except for the `kept` last tokens."""
    if len(example.ids) <= limit:
        return example
    if PARTS in example.columns:
        cut = [(ids[:limit], mask[:limit]) for ids, mask in example.sequences]
        ids, masks = zip(*cut, strict=True)
        lengths = {PARTS: tuple(float(len(one)) for one in ids)}
        return replace(
            example,
            ids=np.concatenate(ids),
            mask=np.concatenate(masks),
            columns={**example.columns, **lengths},
        )
    kept = min(example.kept, limit)
    if not kept:
        return replace(example, ids=example.ids[:limit].copy(), mask=example.mask[:limit].copy())
    places = [*range(limit - kept), *range(len(example.ids) - kept, len(example.ids))]
    return replace(example, ids=example.ids[places], mask=example.mask[places])


def chunks(document: Example, limit: int, overlap: int) -> list[Example]:
    """Of at most `limit` tokens, each beginning with the last `overlap` of the one before.

    Every token is a label once, but for the first of the document and, without an overlap, the
    first of every chunk, which have no token before them.
    """
    made = []
    for start in range(0, len(document.ids) - overlap, limit - overlap):
        mask = document.mask[start : start + limit].copy()
        mask[: max(overlap if start else 0, 1)] = False
        if mask.any():
            ids = document.ids[start : start + limit]
            made.append(replace(document, ids=ids, mask=mask))
    return made


def _refuse_bad(opened: Source, data: DataConfig, tally: Tally) -> None:
    bad = tally.bad.total()
    value = f"{opened.label}.path={opened.name}"
    if tally.lossy > data.max_bad_fraction * tally.rows:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in tally.lost.most_common())
        first = next(iter(tally.first_lost.values()))
        raise DataError(
            value,
            f"has {tally.lossy:,} rows of {tally.rows:,} of which the chat template leaves "
            f"something out ({kinds}; the first is {first}), more than "
            f"data.max_bad_fraction={data.max_bad_fraction} allows",
            f"take it out of the rows, write {opened.label}.chat_template with one that writes it, "
            "or raise data.max_bad_fraction to train without it",
        )
    if bad > data.max_bad_fraction * tally.rows:
        causes = ", ".join(f"{cause} {count:,}" for cause, count in tally.bad.most_common())
        first = next(iter(tally.first_bad.values()))
        raise DataError(
            value,
            f"has {bad:,} unusable rows of {tally.rows:,} ({causes}; the first is {first}), more "
            f"than data.max_bad_fraction={data.max_bad_fraction} allows",
            f"{_remedy(tally)} or raise data.max_bad_fraction",
        )
    if not tally.usable:
        rule = f"leaves no usable row of {tally.rows:,} ({bad:,} bad, {tally.dropped:,} too long)"
        cut = tally.longest if tally.dropped else tally.lacking
        raise DataError(value, rule, f"write data.max_length={cut}" if cut else "mend the rows")


def _remedy(tally: Tally) -> str:
    """What keeps the bad rows."""
    if {"template", "unwritten_turn"} >= tally.bad.keys():
        return "write rows that the template takes, another as chat_template of the source,"
    if not tally.lacking:
        return "mend them"
    longer = f"write data.max_length={tally.lacking} to keep the no_label_token rows"
    return longer + ", mend the others" * (len(tally.bad) > 1)


def summary(report: SourceReport) -> str:
    """One line on a source."""
    found = [f"{report.usable:,} of {report.rows:,} rows usable", f"{report.tokens:,} tokens"]
    found += [f"{count:,} {cause}" for cause, count in report.bad.items()]
    if report.truncated:
        found.append(f"{report.truncated:,} truncated")
    if report.dropped:
        found.append(f"{report.dropped:,} dropped as too long")
    found += facts(report)
    return ", ".join(found)


def _end_words(ends: Counter[str], encoder: Encoder) -> dict[str, int]:
    """Special token -> trained turns that end with it; "" counts those that end with none."""
    words = {
        end: "" if int(end) < 0 else encoder.tokenizer.convert_ids_to_tokens(int(end))
        for end in ends
    }
    return {str(words[end]): count for end, count in ends.most_common()}
