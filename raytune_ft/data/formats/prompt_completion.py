"""Pairs of prompt and completion: two texts, or two lists of turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats.chat import CHAT
from raytune_ft.data.formats.example import Encoder, Example, RowReader, bad_text, example_of
from raytune_ft.data.rows import BadRow, Row


def _columns(source: SourceConfig) -> dict[str, str]:
    return {"prompt": source.prompt, "completion": source.completion}


def _has_turns(source: SourceConfig, row: Row) -> bool:
    return any(isinstance(row.values[name], list) for name in (source.prompt, source.completion))


def _check(source: SourceConfig, row: Row) -> BadRow | None:
    if _has_turns(source, row):
        return None
    return bad_text(row, source.prompt) or bad_text(row, source.completion)


def _encode(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    """Texts apart, so that no token spans the boundary between prompt and completion; turns as a
    conversation in which those of the completion carry loss.
    """
    chats = [row for row in rows if _has_turns(source, row)]
    made = dict(zip(map(id, chats), CHAT.encode(encoder, source, separator, chats), strict=True))
    texts = [row for row in rows if id(row) not in made]
    spelled = source.special_tokens
    prompts = encoder.encode([row.values[source.prompt] + separator for row in texts], spelled)
    completions = encoder.encode([row.values[source.completion] for row in texts], spelled)
    for row, prompt, completion in zip(texts, prompts, completions, strict=True):
        one = example_of(row, [*encoder.prefix, *prompt], [*completion, *encoder.suffix])
        notes = encoder.notes(source, row.values[source.prompt], row.values[source.completion])
        made[id(row)] = replace(one, notes=notes)
    return [made[id(row)] for row in rows]


PROMPT_COMPLETION = RowReader(
    columns=_columns,
    check=_check,
    prompt=lambda source, row: str(row.values[source.prompt]),
    encode=_encode,
    optional=lambda source: (source.tools,) if source.tools is not None else (),
)
