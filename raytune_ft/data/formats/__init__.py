"""Rows become token ids and a mask of the tokens that carry loss.

A format is one function and one entry of `FORMATS`. It gets many rows at once, because fast
tokenizers encode a batch on all cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats.chat import check_messages, encode_messages, message_columns
from raytune_ft.data.formats.classification import (
    TARGET,
    check_classified,
    classified_columns,
    encode_classified,
)
from raytune_ft.data.formats.example import Encoder, Example, bad_text, example_of
from raytune_ft.data.formats.rationale import (
    RATIONALE,
    check_rationale,
    encode_rationale,
    rationale_columns,
)
from raytune_ft.data.report import DataReport, prompt_key
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.data.split import TokenIds, TokenizedSplit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FORMATS",
    "Encoder",
    "Example",
    "Format",
    "columns_of",
    "describe_example",
    "describe_target",
    "encode_rows",
]

WEIGHT = "weight"
"""Column of examples: by how much one counts."""


@dataclass(frozen=True)
class Format:
    """How one format reads its rows.

    Attributes:
        columns: config key -> column, for the columns that a row must have.
        check: the reason why a row with these columns makes no example, or None.
        encode: sound rows -> one result each. Arguments: encoder, source, separator, rows.
    """

    columns: Callable[[SourceConfig], dict[str, str]]
    check: Callable[[SourceConfig, Row], BadRow | None]
    encode: Callable[[Encoder, SourceConfig, str, Sequence[Row]], list[Example | BadRow]]


def encode_rows(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row | BadRow]
) -> Iterator[Example | BadRow]:
    """One result for each row, in order; nothing is cut to a length here.

    Raises:
        DataError: the tokenizer cannot do what the format needs.
    """
    chosen = FORMATS[source.format]
    checked = [row if isinstance(row, BadRow) else _checked(chosen, source, row) for row in rows]
    sound = [row for row in checked if isinstance(row, Row)]
    encoded = iter(chosen.encode(encoder, source, separator, sound))
    for row in checked:
        result = row if isinstance(row, BadRow) else next(encoded)
        if isinstance(row, Row) and isinstance(result, Example):
            result = _completed(source, row, result)
        yield result


def columns_of(source: SourceConfig) -> dict[str, str]:
    """Config key -> column, for the columns that a row must have."""
    columns = FORMATS[source.format].columns(source)
    return columns | ({WEIGHT: source.example_weight} if source.example_weight is not None else {})


def _checked(chosen: Format, source: SourceConfig, row: Row) -> Row | BadRow:
    if source.example_weight is not None and _weight(row.values[source.example_weight]) is None:
        shown = repr(row.values[source.example_weight])[:40]
        return BadRow(row.origin, "bad_weight", f"{shown} is no number of at least 0")
    return chosen.check(source, row) or row


def _completed(source: SourceConfig, row: Row, example: Example) -> Example:
    """With what all formats have in common."""
    columns, column = dict(example.columns), source.example_weight
    if column is not None and (weight := _weight(row.values[column])) is not None:
        columns[WEIGHT] = (weight,)
    others = tuple(_completed(source, row, other) for other in example.others)
    return replace(example, prompt=prompt_key(source, row), columns=columns, others=others)


def _weight(value: Any) -> float | None:
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return weight if math.isfinite(weight) and weight >= 0 else None


# prompt_completion


def _prompt_columns(source: SourceConfig) -> dict[str, str]:
    return {"prompt": source.prompt, "completion": source.completion}


def _check_prompt(source: SourceConfig, row: Row) -> BadRow | None:
    return bad_text(row, source.prompt) or bad_text(row, source.completion)


def _encode_prompt(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    """Prompt and completion apart, so that no token reaches over the boundary between them."""
    prompts = encoder.encode([row.values[source.prompt] + separator for row in rows])
    completions = encoder.encode([row.values[source.completion] for row in rows])
    return [
        example_of(row, [*encoder.prefix, *prompt], [*completion, *encoder.suffix])
        for row, prompt, completion in zip(rows, prompts, completions, strict=True)
    ]


# text


def _text_columns(source: SourceConfig) -> dict[str, str]:
    return {"text": source.text}


def _check_text(source: SourceConfig, row: Row) -> BadRow | None:
    return bad_text(row, source.text)


def _encode_text(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    documents = encoder.encode([row.values[source.text] for row in rows])
    return [
        example_of(row, list(encoder.prefix), [*ids, *encoder.suffix])
        for row, ids in zip(rows, documents, strict=True)
    ]


FORMATS: dict[str, Format] = {
    "prompt_completion": Format(_prompt_columns, _check_prompt, _encode_prompt),
    "messages": Format(message_columns, check_messages, encode_messages),
    "text": Format(_text_columns, _check_text, _encode_text),
    "classification": Format(classified_columns, check_classified, encode_classified),
    "rationale": Format(rationale_columns, check_rationale, encode_rationale),
}


def describe_example(
    split: TokenizedSplit, i: int, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Example `i` decoded in pieces, each with whether it carries loss.

    The pieces joined are the whole example decoded: a piece is what its tokens add to the text
    before them, because a tokenizer may decode a token differently at the start of a text.
    """
    ids, mask = split.example(i)
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
    """What example `i` is to be beside its label tokens, as lines below it; mostly nothing."""
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
