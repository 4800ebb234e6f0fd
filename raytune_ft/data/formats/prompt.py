"""Prompts to be answered: a text, or the turns of a conversation; a completion is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats.conversation import Turn, conversation_of, turns_column
from raytune_ft.data.formats.example import (
    Encoder,
    Example,
    RowReader,
    SpecialText,
    bad_text,
    example_of,
)
from raytune_ft.data.formats.template import Template, Unwritten
from raytune_ft.data.rows import BadRow, Row

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Prompt:
    """A prompt and its row.

    Attributes:
        ids: what the model is given, exactly as in training.
        reference: token ids of the row's completion; empty where it has none.
        columns: the values of the row.
        turns: the prompt as a conversation; None where it is a text.
        text: the prompt as the row has it; empty for conversations.
    """

    origin: str
    ids: tuple[int, ...]
    reference: tuple[int, ...]
    columns: dict[str, Any]
    turns: tuple[Turn, ...] | None = None
    text: str = ""

    @property
    def written(self) -> Any:
        """The prompt in a file of preferences: a text, or turns."""
        return self.text if self.turns is None else list(self.turns)


def read_prompt(
    row: Row | BadRow, source: SourceConfig, separator: str, encoder: Encoder
) -> Prompt | BadRow:
    """The prompt of a row, in the column `source.prompt` or in that of turns, of which a last one
    of the assistant is the answer that the row has.
    """
    if isinstance(row, BadRow):
        return row
    values = row.values
    column = next(
        (name for name in (source.prompt, turns_column(source)) if values.get(name)), None
    )
    if column is None:
        return BadRow(row.origin, "missing_column", f"no {source.prompt!r}")
    if not isinstance(values[column], str):
        return _of_turns(row, column, source, encoder)
    bad = bad_text(row, column)
    if bad is not None:
        return bad
    text = values[column]
    ids = encoder.encode([text + separator], source.special_tokens)[0]
    reference = values.get(source.completion)
    known = encoder.encode([reference])[0] if isinstance(reference, str) else []
    return Prompt(row.origin, (*encoder.prefix, *ids), tuple(known), values, text=text)


def _of_turns(row: Row, column: str, source: SourceConfig, encoder: Encoder) -> Prompt | BadRow:
    if not encoder.tokenizer.chat_template:
        return BadRow(row.origin, "template", "the model's tokenizer has no chat template")
    value = row.values[column]
    asked: list[Any] = list(value) if isinstance(value, list) else []
    said = bool(asked) and isinstance(asked[-1], dict) and asked[-1].get("role") == ASSISTANT
    answer = asked.pop() if said else {"role": ASSISTANT, "content": "-"}
    chat = conversation_of(
        source.model_copy(update={"format": "messages", "messages": column}),
        Row(row.origin, {**row.values, column: [*asked, answer]}),
    )
    if isinstance(chat, BadRow):
        return chat
    turns = chat.turns[:-1]
    hidden = encoder.hide(turns) if source.special_tokens == "text" else turns
    try:
        text, _ = Template(encoder, (ASSISTANT,)).render(hidden, chat.tools, prompt=True)
    except Unwritten as error:
        return BadRow(row.origin, "template", str(error))
    (one,) = encoder.labelled([(text, [])])
    if isinstance(one, SpecialText):
        return BadRow(row.origin, "template", str(one))
    content = answer.get("content")
    known = encoder.encode([content])[0] if said and isinstance(content, str) else []
    return Prompt(row.origin, tuple(one.ids.tolist()), tuple(known), row.values, tuple(turns))


def _encode(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    found = [read_prompt(row, source, separator, encoder) for row in rows]
    return [
        one if isinstance(one, BadRow) else example_of(row, list(one.ids), [])
        for row, one in zip(rows, found, strict=True)
    ]


def _check(source: SourceConfig, row: Row) -> BadRow | None:
    value = row.values[source.prompt]
    return bad_text(row, source.prompt) if isinstance(value, str) or not value else None


PROMPT = RowReader(
    columns=lambda source: {"prompt": source.prompt},
    check=_check,
    prompt=lambda source, row: str(row.values[source.prompt]),
    encode=_encode,
    optional=lambda source: (source.tools,) if source.tools is not None else (),
)
