"""Conversations: the chat template writes them, and chosen roles carry loss."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from raytune_ft.config.data import SourceConfig
from raytune_ft.config.reference import one_of
from raytune_ft.data.formats.example import Encoder, Example, RowReader
from raytune_ft.data.rows import BadRow, Row, valid_unicode
from raytune_ft.errors import DataError

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""In a chat template that marks the assistant's text itself."""


def _columns(source: SourceConfig) -> dict[str, str]:
    tools = {"tools": source.tools} if source.tools is not None else {}
    return {"messages": source.messages, **tools}


def _check(source: SourceConfig, row: Row) -> BadRow | None:
    turns = row.values[source.messages]
    if isinstance(turns, str) and not valid_unicode(turns):
        return BadRow(row.origin, "bad_encoding", f"{source.messages!r} is not UTF-8")
    if turns is None or turns == []:
        return BadRow(row.origin, "empty", f"{source.messages!r} has no turns")
    if not isinstance(turns, list) or not all(map(_is_turn, turns)):
        detail = f"{source.messages!r} is not a list of objects with the texts `role` and `content`"
        return BadRow(row.origin, "wrong_type", detail)
    tools = row.values[source.tools] if source.tools is not None else None
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        return BadRow(row.origin, "wrong_type", f"{source.tools!r} is not a list of objects")
    if not all(map(_valid_turn, turns)):
        return BadRow(row.origin, "bad_encoding", f"{source.messages!r} has half a character")
    return None


def _is_turn(turn: Any) -> bool:
    """`content` may be absent where a turn calls tools instead."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return False
    content = turn.get("content")
    return isinstance(content, str) or (content is None and bool(turn.get("tool_calls")))


def _valid_turn(turn: dict[str, Any]) -> bool:
    return all(valid_unicode(value) for value in turn.values() if isinstance(value, str))


def _encode(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    """The chat template writes the conversation; the turns of the trained roles carry loss.

    The template also writes BOS and the ends of turns, so no token is added around it.

    Raises:
        DataError: the tokenizer has no chat template or no offsets, or the template rewrites
            earlier turns, so that a trained turn cannot be found in its output.
    """
    tokenizer = encoder.tokenizer
    if not tokenizer.chat_template:
        raise DataError(
            f"format={source.format}",
            "needs a chat template, which this model's tokenizer does not have",
            "write format: prompt_completion, or a model with a chat template",
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"format={source.format}",
            "needs character offsets, which this model's tokenizer (a slow one) does not give",
            "write format: prompt_completion, or a model with a fast tokenizer",
        )
    marked = _GENERATION_MARK.search(tokenizer.get_chat_template()) is not None
    # The template marks only the assistant's text.
    write = _encode_marked if marked and source.train_on == ["assistant"] else _encode_unmarked
    return [_conversation(encoder, _Chat.of(source, row), row, write) for row in rows]


def _prompt(source: SourceConfig, row: Row) -> str:
    """Everything before the last turn of the assistant."""
    turns: list[dict[str, Any]] = row.values[source.messages]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    return "\n".join(str(turn.get("content") or "") for turn in turns[:last])


MESSAGES = RowReader(columns=_columns, check=_check, prompt=_prompt, encode=_encode)


@dataclass(frozen=True)
class _Chat:
    """One conversation, and the roles that carry loss."""

    origin: str
    turns: list[dict[str, Any]]
    roles: tuple[str, ...]
    tools: list[dict[str, Any]] | None

    @classmethod
    def of(cls, source: SourceConfig, row: Row) -> _Chat:
        tools = row.values[source.tools] if source.tools is not None else None
        return cls(row.origin, row.values[source.messages], tuple(source.train_on), tools or None)


Written = tuple[list[int], list[int]]
"""Token ids of a conversation, and 1 for each of them that carries loss."""


def _conversation(
    encoder: Encoder,
    chat: _Chat,
    row: Row,
    write: Callable[[Encoder, _Chat], Written],
) -> Example | BadRow:
    if not any(turn["role"] in chat.roles for turn in chat.turns):
        return BadRow(row.origin, "no_trained_turn", f"no turn is of {one_of(chat.roles)}")
    try:
        ids, said = write(encoder, chat)
    except TemplateError as error:
        return BadRow(row.origin, "template", f"the chat template refuses it: {error}")
    mask = np.array(said, dtype=np.bool_)
    mask[:1] = False
    return Example(row.origin, np.array(ids, dtype=np.int32), mask)


def _encode_marked(encoder: Encoder, chat: _Chat) -> Written:
    """For a template with {% generation %}, which marks the assistant's text itself."""
    written = encoder.tokenizer.apply_chat_template(
        chat.turns,
        tools=chat.tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return written["input_ids"], written["assistant_masks"]


def _encode_unmarked(encoder: Encoder, chat: _Chat) -> Written:
    """Find each trained turn as the text that its rendering adds to the rendering before it.

    The header that the template writes to prompt the assistant belongs to what comes before.
    """
    turns = chat.turns
    whole = _rendered(encoder, chat, len(turns))
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] not in chat.roles:
            continue
        prompt = turn["role"] == "assistant"
        before = _rendered(encoder, chat, number, prompt) if number else ""
        until = _rendered(encoder, chat, number + 1)
        if not until.startswith(before):
            # Some templates prompt with more than a header, such as an opened <think>.
            before = _rendered(encoder, chat, number)
        if not (whole.startswith(until) and until.startswith(before)):
            raise DataError(
                f"{chat.origin} turn {number + 1}",
                "is written differently by the chat template once other turns follow it, so its "
                "tokens cannot be identified",
                "write a model whose chat template marks it with {% generation %}, or "
                "conversations that end with their only assistant turn",
            )
        spans.append((len(before), len(until)))
    encoded = encoder.tokenizer(
        whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    said = [0] * len(encoded["input_ids"])
    for start, stop in spans:
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < stop and b > start]
        # From the first to the last, so that a token of width 0 between them is included.
        for i in range(inside[0], inside[-1] + 1) if inside else ():
            said[i] = 1
    return encoded["input_ids"], said


def _rendered(encoder: Encoder, chat: _Chat, count: int, prompt: bool = False) -> str:
    """The first `count` turns as text; `prompt` adds the header that prompts the assistant."""
    text: str = encoder.tokenizer.apply_chat_template(
        chat.turns[:count], tools=chat.tools, tokenize=False, add_generation_prompt=prompt
    )
    return text
