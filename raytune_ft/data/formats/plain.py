"""Prompts with completions, and plain documents."""

from __future__ import annotations

from collections.abc import Sequence

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats.example import Encoder, Example, RowReader, bad_text, example_of
from raytune_ft.data.rows import BadRow, Row


def _prompt_columns(source: SourceConfig) -> dict[str, str]:
    return {"prompt": source.prompt, "completion": source.completion}


def _check_prompt(source: SourceConfig, row: Row) -> BadRow | None:
    return bad_text(row, source.prompt) or bad_text(row, source.completion)


def _encode_prompts(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    """Prompt and completion apart, so that no token spans the boundary between them."""
    prompts = encoder.encode([row.values[source.prompt] + separator for row in rows])
    completions = encoder.encode([row.values[source.completion] for row in rows])
    return [
        example_of(row, [*encoder.prefix, *prompt], [*completion, *encoder.suffix])
        for row, prompt, completion in zip(rows, prompts, completions, strict=True)
    ]


PROMPT_COMPLETION = RowReader(
    columns=_prompt_columns,
    check=_check_prompt,
    prompt=lambda source, row: str(row.values[source.prompt]),
    encode=_encode_prompts,
)


def _encode_texts(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    documents = encoder.encode([row.values[source.text] for row in rows])
    return [
        example_of(row, list(encoder.prefix), [*ids, *encoder.suffix])
        for row, ids in zip(rows, documents, strict=True)
    ]


TEXT = RowReader(
    columns=lambda source: {"text": source.text},
    check=lambda source, row: bad_text(row, source.text),
    prompt=lambda source, row: str(row.values[source.text]),
    encode=_encode_texts,
)
