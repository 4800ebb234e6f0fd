"""Rows become token ids and a mask of the tokens that carry loss.

A format is one `RowReader` and one entry of `config.data.FORMATS`, which says how it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raytune_ft.config.data import FORMATS, SourceConfig
from raytune_ft.config.reference import one_of
from raytune_ft.data.formats.classification import TARGET
from raytune_ft.data.formats.conversation import parsed
from raytune_ft.data.formats.example import Encoder, Example, RowReader
from raytune_ft.data.formats.rationale import RATIONALE
from raytune_ft.data.report import DataReport, prompt_key
from raytune_ft.data.rows import BadRow, Row, number_of
from raytune_ft.data.sources import Source
from raytune_ft.data.split import Mask, TokenIds, TokenizedSplit
from raytune_ft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Encoder",
    "Example",
    "RowReader",
    "columns_of",
    "describe_example",
    "describe_target",
    "encode_rows",
    "found_format",
    "optional_columns",
    "reader_of",
]

WEIGHT = "weight"
"""Column of examples: the factor of an example's loss."""


def reader_of(source: SourceConfig) -> RowReader:
    """How rows of the source's format are read."""
    reader: RowReader = FORMATS[source.format].implementation()
    return reader


TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue")
"""Columns in which files keep the turns of a conversation."""


def found_format(label: str, source: SourceConfig, opened: Source) -> SourceConfig:
    """The source with the format that its columns show, where `auto` is written.

    Raises:
        DataError: they show none.
    """
    if source.format != "auto":
        return source
    first = next((row for row in opened.all_rows() if isinstance(row, Row)), None)
    if first is None:
        raise DataError(
            f"{label}.format=auto",
            f"finds no row in {opened.name} that can be read",
            "write a source that has one, or the format",
        )
    values = first.values
    turns = next((name for name in (source.messages, *TURNS) if values.get(name)), None)
    if turns is not None:
        written = parsed(values[turns])
        spoken = isinstance(written, list) and written and isinstance(written[0], dict)
        format = "sharegpt" if spoken and "from" in written[0] else "messages"
        return source.model_copy(update={"format": format, "messages": turns})
    for format, columns in (
        ("prompt_completion", (source.prompt, source.completion)),
        ("alpaca", ("instruction", "output")),
        ("text", (source.text,)),
    ):
        if all(name in values for name in columns):
            return source.model_copy(update={"format": format})
    raise DataError(
        f"{label}.format=auto",
        f"finds no format in the columns of {opened.name}, {one_of(list(values))}",
        "write the format, and the keys that name its columns",
    )


def encode_rows(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row | BadRow]
) -> Iterator[Example | BadRow]:
    """One result for each row, in order, at its full length.

    Raises:
        DataError: the tokenizer lacks something that the format needs.
    """
    reader = reader_of(source)
    checked = [row if isinstance(row, BadRow) else _checked(reader, source, row) for row in rows]
    sound = [row for row in checked if isinstance(row, Row)]
    encoded = iter(reader.encode(encoder, source, separator, sound))
    for row in checked:
        result = row if isinstance(row, BadRow) else next(encoded)
        if isinstance(row, Row) and isinstance(result, Example):
            result = _completed(reader, source, row, result)
        yield result


def optional_columns(source: SourceConfig) -> tuple[str, ...]:
    """Columns that are read from rows that have them."""
    return reader_of(source).optional(source)


def columns_of(source: SourceConfig) -> dict[str, str]:
    """Config key -> column, for the columns that a row must have."""
    columns = reader_of(source).columns(source)
    return columns | ({WEIGHT: source.example_weight} if source.example_weight is not None else {})


def _checked(reader: RowReader, source: SourceConfig, row: Row) -> Row | BadRow:
    if source.example_weight is not None and _weight(row.values[source.example_weight]) is None:
        shown = repr(row.values[source.example_weight])[:40]
        return BadRow(row.origin, "bad_weight", f"{shown} is not a number of at least 0")
    return reader.check(source, row) or row


def _completed(reader: RowReader, source: SourceConfig, row: Row, example: Example) -> Example:
    """Adds the weight and the prompt's hash, which every format has, to all examples of the row."""
    column = source.example_weight
    if reader.prompt is None and column is None:
        return example
    prompt = example.prompt if reader.prompt is None else prompt_key(reader.prompt(source, row))
    weight = None if column is None else _weight(row.values[column])
    weights = {} if weight is None else {WEIGHT: (weight,)}
    others = tuple(
        replace(other, prompt=prompt, columns={**other.columns, **weights})
        for other in example.others
    )
    columns = {**example.columns, **weights}
    return replace(example, prompt=prompt, columns=columns, others=others)


def _weight(value: Any) -> float | None:
    weight = number_of(value)
    return None if weight is None or weight < 0 else weight


def describe_example(
    split: TokenizedSplit, i: int, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Example `i` decoded in pieces, each with whether it carries loss; a line ends each sequence.

    The pieces joined are a whole sequence decoded: a piece is what its tokens add to the text
    before them, because a tokenizer may decode a token differently at the start of a text.
    """
    found: list[tuple[str, bool]] = []
    for number in range(i * split.parts, (i + 1) * split.parts):
        found += [("\n", False)] if found else []
        found += _pieces(*split.sequence(number), tokenizer)
    return found


def _pieces(
    ids: TokenIds, mask: Mask, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    ends = [*(np.flatnonzero(np.diff(mask)) + 1), len(ids)]
    pieces, text, start = [], "", 0
    for end in ends:
        longer = _decoded(tokenizer, ids[:end])
        added = longer[len(text) :] if longer.startswith(text) else None
        piece = _decoded(tokenizer, ids[start:end]) if added is None else added
        pieces.append((piece, bool(mask[end - 1])))
        text, start = longer, end
    return pieces


def describe_target(split: TokenizedSplit, i: int, report: DataReport) -> str:
    """Labels, task and weight of example `i`, each on a line of its own; mostly empty."""
    columns = {name: values[i] for name, values in split.columns.items()}
    lines = []
    if TARGET in columns and report.problem == "regression":
        lines.append(f"numbers: {', '.join(f'{value:g}' for value in columns[TARGET])}")
    elif TARGET in columns:
        chosen = [n for n, value in zip(report.labels, columns[TARGET], strict=True) if value]
        lines.append(f"label: {', '.join(chosen) or 'none'} (of {', '.join(report.labels[:12])})")
    if RATIONALE in columns:
        lines.append(f"task: {'rationale' if columns[RATIONALE][0] else 'answer'}")
    if WEIGHT in columns:
        lines.append(f"weight: {columns[WEIGHT][0]:g}")
    return "".join(f"\n{line}" for line in lines)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: TokenIds) -> str:
    text: str = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    return text
