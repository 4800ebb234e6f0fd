"""Rows become token ids and a mask of the tokens that carry loss.

A format is one function and one entry of `FORMATS`. It gets many rows at once, because fast
tokenizers encode a batch on all cores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.overlap import prompt_key
from raytune_ft.data.split import Mask, TokenIds, TokenizedSplit
from raytune_ft.data.text_rows import BadRow, Row, valid_unicode
from raytune_ft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Stands in a chat template that marks by itself what the assistant says."""


@dataclass(frozen=True)
class Example:
    """Token ids and the label mask of one row; the first token is never a label.

    `prompt` is `overlap.prompt_key` of the row, `difficulty` what a curriculum goes by, `source`
    the number of the row's source.
    """

    origin: str
    ids: TokenIds
    mask: Mask
    prompt: bytes = b""
    difficulty: float = 0.0
    source: int = 0


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and what it puts around a text of its own accord.

    Attributes:
        prefix: what it puts in front (its BOS, where it adds one by default).
        eos: the end of an example, None where the tokenizer has no such token.
    """

    tokenizer: PreTrainedTokenizerBase
    prefix: tuple[int, ...]
    eos: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """Ask the tokenizer what it adds, by encoding the same text with and without."""
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        dressed = tokenizer("a")["input_ids"]
        starts = range(len(dressed) - len(bare) + 1)
        at = next((i for i in starts if dressed[i : i + len(bare)] == bare), 0)
        return cls(tokenizer, tuple(dressed[:at]), tokenizer.eos_token_id)

    @property
    def suffix(self) -> list[int]:
        """The end of an example."""
        return [] if self.eos is None else [self.eos]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text and nothing around them."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


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
    checked = [row if isinstance(row, BadRow) else chosen.check(source, row) or row for row in rows]
    sound = [row for row in checked if isinstance(row, Row)]
    encoded = iter(chosen.encode(encoder, source, separator, sound))
    for row in checked:
        result = row if isinstance(row, BadRow) else next(encoded)
        if isinstance(row, Row) and isinstance(result, Example):
            result = replace(result, prompt=prompt_key(source, row))
        yield result


# prompt_completion


def _prompt_columns(source: SourceConfig) -> dict[str, str]:
    return {"prompt": source.prompt, "completion": source.completion}


def _check_prompt(source: SourceConfig, row: Row) -> BadRow | None:
    return _bad_text(row, source.prompt) or _bad_text(row, source.completion)


def _encode_prompt(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    """Prompt and completion apart, so that no token reaches over the boundary between them."""
    prompts = encoder.encode([row.values[source.prompt] + separator for row in rows])
    completions = encoder.encode([row.values[source.completion] for row in rows])
    return [
        _example(row, [*encoder.prefix, *prompt], [*completion, *encoder.suffix])
        for row, prompt, completion in zip(rows, prompts, completions, strict=True)
    ]


# text


def _text_columns(source: SourceConfig) -> dict[str, str]:
    return {"text": source.text}


def _check_text(source: SourceConfig, row: Row) -> BadRow | None:
    return _bad_text(row, source.text)


def _encode_text(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    documents = encoder.encode([row.values[source.text] for row in rows])
    return [
        _example(row, list(encoder.prefix), [*ids, *encoder.suffix])
        for row, ids in zip(rows, documents, strict=True)
    ]


# messages


def _message_columns(source: SourceConfig) -> dict[str, str]:
    return {"messages": source.messages}


def _check_messages(source: SourceConfig, row: Row) -> BadRow | None:
    turns = row.values[source.messages]
    if isinstance(turns, str) and not valid_unicode(turns):
        return BadRow(row.origin, "bad_encoding", f"{source.messages!r} is no UTF-8")
    if turns is None or turns == []:
        return BadRow(row.origin, "empty", f"{source.messages!r} holds no turn")
    if not isinstance(turns, list) or not all(map(_is_turn, turns)):
        detail = f"{source.messages!r} is no list of objects with the texts `role` and `content`"
        return BadRow(row.origin, "wrong_type", detail)
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


def _encode_messages(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    """The chat template writes the conversation; what the assistant says carries loss.

    The template also writes BOS and ends of turns, so that nothing is added around it.

    Raises:
        DataError: the tokenizer has no chat template or no offsets, or the template rewrites
            earlier turns, so that what the assistant said cannot be found in its output.
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
    write = _encode_marked if marked else _encode_unmarked
    return [_conversation(encoder, row, row.values[source.messages], write) for row in rows]


Written = tuple[list[int], list[int]]
"""Token ids of a conversation, and 1 for each of them that the assistant said."""


def _conversation(
    encoder: Encoder,
    row: Row,
    turns: list[dict[str, Any]],
    write: Callable[[Encoder, str, list[dict[str, Any]]], Written],
) -> Example | BadRow:
    try:
        ids, said = write(encoder, row.origin, turns)
    except TemplateError as error:
        return BadRow(row.origin, "template", f"the chat template refuses it: {error}")
    mask = np.array(said, dtype=np.bool_)
    mask[:1] = False
    return Example(row.origin, np.array(ids, dtype=np.int32), mask)


def _encode_marked(encoder: Encoder, origin: str, turns: list[dict[str, Any]]) -> Written:
    """For a template with {% generation %}: it says itself what the assistant said."""
    written = encoder.tokenizer.apply_chat_template(
        turns,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return written["input_ids"], written["assistant_masks"]


def _encode_unmarked(encoder: Encoder, origin: str, turns: list[dict[str, Any]]) -> Written:
    """Find each assistant turn as what its rendering adds to the rendering up to it.

    The header that the template writes to prompt the assistant belongs to what comes before.
    """
    whole = _rendered(encoder, turns)
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _rendered(encoder, turns[:number], prompt=True) if number else ""
        until = _rendered(encoder, turns[: number + 1])
        if not until.startswith(before):
            # Some templates prompt with more than a header, such as an opened <think>.
            before = _rendered(encoder, turns[:number])
        if not (whole.startswith(until) and until.startswith(before)):
            raise DataError(
                f"{origin} turn {number + 1}",
                "is written differently by the chat template once other turns follow it, so that "
                "what the assistant said cannot be told apart",
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
        # From the first to the last, so that a token of no width between them is not lost.
        for i in range(inside[0], inside[-1] + 1) if inside else ():
            said[i] = 1
    return encoded["input_ids"], said


def _rendered(encoder: Encoder, turns: list[dict[str, Any]], prompt: bool = False) -> str:
    text: str = encoder.tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=prompt
    )
    return text


FORMATS: dict[str, Format] = {
    "prompt_completion": Format(_prompt_columns, _check_prompt, _encode_prompt),
    "messages": Format(_message_columns, _check_messages, _encode_messages),
    "text": Format(_text_columns, _check_text, _encode_text),
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


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: TokenIds) -> str:
    text: str = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    return text


def _bad_text(row: Row, column: str) -> BadRow | None:
    value = row.values[column]
    if value is None:
        return BadRow(row.origin, "empty", f"{column!r} has no value")
    if not isinstance(value, str):
        detail = f"{column!r} is {type(value).__name__} where a text is needed"
        return BadRow(row.origin, "wrong_type", detail)
    if not value.strip():
        return BadRow(row.origin, "empty", f"{column!r} is blank")
    if not valid_unicode(value):
        return BadRow(row.origin, "bad_encoding", f"{column!r} has half a character or no UTF-8")
    return None


def _example(row: Row, context: list[int], labels: list[int]) -> Example:
    mask = np.zeros(len(context) + len(labels), dtype=np.bool_)
    mask[len(context) :] = True
    mask[:1] = False
    return Example(row.origin, np.array(context + labels, dtype=np.int32), mask)
