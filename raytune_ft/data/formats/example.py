"""What an example is, how a tokenizer encodes texts, and how a format reads rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.rows import BadRow, Row, valid_unicode
from raytune_ft.data.split import Mask, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """Token ids and the label mask of one row; the first token is never a label.

    Attributes:
        prompt: `report.prompt_key` of the row's prompt.
        columns: see `TokenizedSplit.columns`.
        labels: classes or numbers that a classifier is to predict; None for other formats.
        kept: number of tokens at the end, such as [SEP], that stay when the example is cut.
        others: more examples of the same row.
        difficulty: what a curriculum sorts by.
        source: the number of the row's source.
    """

    origin: str
    ids: TokenIds
    mask: Mask
    prompt: bytes = b""
    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    labels: tuple[str | float, ...] | None = None
    kept: int = 0
    others: tuple[Example, ...] = ()
    difficulty: float = 0.0
    source: int = 0


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and the special tokens that it puts around a text.

    Attributes:
        prefix: tokens before a text (BOS, if the tokenizer adds it by default).
        eos: the token that ends an example, None if the tokenizer has none.
    """

    tokenizer: PreTrainedTokenizerBase
    prefix: tuple[int, ...]
    eos: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """Finds what the tokenizer adds by encoding a text with and without special tokens."""
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        dressed = tokenizer("a")["input_ids"]
        starts = range(len(dressed) - len(bare) + 1)
        at = next((i for i in starts if dressed[i : i + len(bare)] == bare), 0)
        return cls(tokenizer, tuple(dressed[:at]), tokenizer.eos_token_id)

    @property
    def suffix(self) -> list[int]:
        """Tokens after an example."""
        return [] if self.eos is None else [self.eos]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


@dataclass(frozen=True)
class RowReader:
    """How the rows of one format become examples.

    `encode` gets many rows at once, because fast tokenizers encode a batch on all cores.

    Attributes:
        columns: source -> {config key: column}, the columns that a row must have.
        check: (source, row) -> why a row with these columns cannot be used, or None.
        prompt: (source, row) -> the text by which two examples ask the same; the overlap of splits
            is counted by it.
        encode: (encoder, source, separator, sound rows) -> one result for each row.
    """

    columns: Callable[[SourceConfig], dict[str, str]]
    check: Callable[[SourceConfig, Row], BadRow | None]
    prompt: Callable[[SourceConfig, Row], str]
    encode: Callable[[Encoder, SourceConfig, str, Sequence[Row]], list[Example | BadRow]]


def bad_text(row: Row, column: str) -> BadRow | None:
    """The row as a `BadRow` if the column does not hold a usable text, else None."""
    value = row.values[column]
    if value is None:
        return BadRow(row.origin, "empty", f"{column!r} has no value")
    if not isinstance(value, str):
        detail = f"{column!r} is {type(value).__name__} where a text is needed"
        return BadRow(row.origin, "wrong_type", detail)
    if not value.strip():
        return BadRow(row.origin, "empty", f"{column!r} is blank")
    if not valid_unicode(value):
        return BadRow(
            row.origin, "bad_encoding", f"{column!r} has half a character or is not UTF-8"
        )
    return None


def example_of(row: Row, context: list[int], labels: list[int]) -> Example:
    """An example of context without loss, then label tokens."""
    mask = np.zeros(len(context) + len(labels), dtype=np.bool_)
    mask[len(context) :] = True
    mask[:1] = False
    return Example(row.origin, np.array(context + labels, dtype=np.int32), mask)


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
