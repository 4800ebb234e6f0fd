"""From one source to its examples: rows are encoded, cut to length, dropped or counted as bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
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
from raytune_ft.data.formats.rationale import RATIONALE
from raytune_ft.data.report import SourceReport, facts
from raytune_ft.data.rows import BadRow, Row, number_of
from raytune_ft.data.sources import BATCH_ROWS, Source
from raytune_ft.data.split import PARTS
from raytune_ft.errors import DataError

PROGRESS_ROWS = 20_000

EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that a column may have in a row that has nothing there."""

Progress = Callable[[str], None]


@dataclass
class _Tally:
    """Counts of one source while it is read.

    `lacking` is the length of the longest row that is bad because its labels lie past the limit.
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
    ends: Counter[int] = field(default_factory=Counter)

    def add_row(self, row: Row | BadRow, columns: Sequence[str] | None) -> None:
        """Counts the columns that have a value; `columns` of a row that holds only those read."""
        if columns is not None:
            self.values.update(columns)
        elif isinstance(row, Row):
            self.values.update(name for name, value in row.values.items() if value not in EMPTY)

    def add_example(self, example: Example) -> None:
        self.lost.update(example.lost)
        self.lossy += bool(example.lost)
        for kind in example.lost:
            self.first_lost.setdefault(kind, example.origin)
        self.notes.update(example.notes)
        self.ends.update(end for one in (example, *example.others) for end in one.ends)

    def add_bad(self, row: BadRow) -> None:
        self.bad[row.cause] += 1
        self.first_bad.setdefault(row.cause, f"{row.origin}: {row.detail}")


def tokenise(
    opened: Source, source: SourceConfig, data: DataConfig, encoder: Encoder, tell: Progress
) -> tuple[list[Example], SourceReport]:
    """The usable examples of one source, and the report on all of its rows."""
    tally, examples = _Tally(), list[Example]()
    column = difficulty_column(data) if opened.label.startswith("data.train") else None
    wanted = {} if column is None else {"data.curriculum.column": column}
    optional = optional_columns(source)
    needed = columns_of(source) | wanted
    rows = opened.rows(needed, optional)
    while chunk := list(islice(rows, BATCH_ROWS)):
        results = encode_rows(encoder, source, data.separator, chunk)
        for row, result in zip(chunk, results, strict=True):
            tally.add_row(row, opened.columns)
            rated = result if column is None else _rated(result, row, column)
            fitted = _fitted(rated, opened.label, source, data, tally)
            if isinstance(fitted, BadRow):
                tally.add_bad(fitted)
            else:
                examples += fitted
                if isinstance(result, Example):
                    tally.add_example(result)
                tally.usable += bool(fitted)
        tally.rows += len(chunk)
        if tally.rows % PROGRESS_ROWS == 0:
            tell(f"{opened.label}: {tally.rows:,} rows")
    _refuse_bad(opened, data, tally)
    if source.example_weight is not None and not any(one.columns[WEIGHT][0] for one in examples):
        rule = "gives every example the weight 0, which leaves nothing to train on"
        raise DataError(
            f"{opened.label}.example_weight={source.example_weight}", rule, "write another column"
        )
    report = SourceReport(
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
        tokens=sum(len(one.ids) for one in examples),
        label_tokens=sum(int(one.mask.sum()) for one in examples),
        unread={
            name: count
            for name, count in tally.values.items()
            if name not in needed.values()
            and name not in optional
            and not FORMATS[source.format].prompts
        },
        lost=dict(sorted(tally.lost.items())),
        first_lost=tally.first_lost,
        notes={name: count for name, count in sorted(tally.notes.items()) if count},
        ends=_end_words(tally.ends, encoder),
    )
    tell(f"{opened.label}: {_summary(report)}")
    return examples, report


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
    result: Example | BadRow, label: str, source: SourceConfig, data: DataConfig, tally: _Tally
) -> list[Example] | BadRow:
    """The examples of a row within `data.max_length`; empty if the row is too long."""
    if isinstance(result, BadRow):
        return result
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


def _refuse_bad(opened: Source, data: DataConfig, tally: _Tally) -> None:
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


def _remedy(tally: _Tally) -> str:
    """What keeps the bad rows."""
    if {"template", "unwritten_turn"} >= tally.bad.keys():
        return "write rows that the template takes, another as chat_template of the source,"
    if not tally.lacking:
        return "mend them"
    longer = f"write data.max_length={tally.lacking} to keep the no_label_token rows"
    return longer + ", mend the others" * (len(tally.bad) > 1)


def _summary(report: SourceReport) -> str:
    found = [f"{report.usable:,} of {report.rows:,} rows usable", f"{report.tokens:,} tokens"]
    found += [f"{count:,} {cause}" for cause, count in report.bad.items()]
    if report.truncated:
        found.append(f"{report.truncated:,} truncated")
    if report.dropped:
        found.append(f"{report.dropped:,} dropped as too long")
    found += facts(report)
    return ", ".join(found)


def _end_words(ends: Counter[int], encoder: Encoder) -> dict[str, int]:
    """Special token -> trained turns that end with it; "" counts those that end with none."""
    words = {end: "" if end < 0 else encoder.tokenizer.convert_ids_to_tokens(end) for end in ends}
    return {str(words[end]): count for end, count in ends.most_common()}
