"""What an example is, how a tokenizer encodes texts, and how a format reads rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats.byte_tokens import ByteTokens, Tokens, byte_tokens
from raytune_ft.data.formats.words import any_of
from raytune_ft.data.rows import BadRow, Row, valid_unicode
from raytune_ft.data.split import PARTS, Mask, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DESIRABLE = "desirable"
"""Column of examples: 1 where an answer is desirable, 0 where it is not."""


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
        ends: the last token of each trained turn if it is a special token, else -1.
        lost: what the row has and the example has not, such as `reasoning`; keys of the report.
        notes: what was done to the row, such as `special_text`; keys of the report.
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
    ends: tuple[int, ...] = ()
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sequences(self) -> list[tuple[TokenIds, Mask]]:
        """(ids, mask) of each of its sequences; most formats have one."""
        if PARTS not in self.columns:
            return [(self.ids, self.mask)]
        ends = np.cumsum(self.columns[PARTS]).astype(np.int64)[:-1]
        return list(zip(np.split(self.ids, ends), np.split(self.mask, ends), strict=True))


def is_rated(example: Example) -> bool:
    """Whether its answers are compared with others to the same prompt, or are still to be given."""
    rated = PARTS in example.columns or DESIRABLE in example.columns
    return rated or (example.labels is None and not example.mask.any())


Piece = tuple[TokenIds, npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""(ids, starts, stops): tokens, and the characters of the text that each of them writes."""

Labels = tuple[str, Sequence[tuple[int, int]]]
"""(rendered text, the spans of its characters that carry loss)."""

TOGETHER = 2**18
"""Characters that are encoded together: enough to be fast, and few enough for any memory."""


class Labelled(NamedTuple):
    """A rendered text as tokens. `ends`: see `Example`."""

    ids: TokenIds
    mask: Mask
    ends: tuple[int, ...]


BREAK = "\ufdd0"
"""Hides a special token that a text spells; no character, so no text has it."""


class SpecialText(Exception):
    """A text spells a special token, and the tokenizer cannot write it as text."""


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

    def encode(self, texts: Sequence[str], spelled: str = "text") -> list[list[int]]:
        """Token ids of each text; no special token is added. `spelled` is what one that the text
        spells is: text, or control.
        """
        if not texts:
            return []
        if self.bytes is not None:
            return self.bytes.encode(texts, as_text=spelled == "text")
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=spelled == "text",
            return_attention_mask=False,
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Matches the special tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        words = {token.content for token in added if token.special}
        return any_of({word for word in words | set(self.tokenizer.all_special_tokens) if word})

    @cached_property
    def added(self) -> tuple[re.Pattern[str], int]:
        """(matches the added tokens, among them the special ones, the length of the longest)."""
        words = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}
        longest = max(map(len, words), default=0)
        return any_of(word for word in words if word.strip()), longest

    @cached_property
    def bytes(self) -> ByteTokens | None:
        """Tells where tokens stand, if the tokenizer is byte-level."""
        return byte_tokens(self.tokenizer)

    def find_facts(self) -> None:
        """Find now what is otherwise found on first use."""
        _ = self.special, self.added, self.bytes

    def notes(self, source: SourceConfig, *texts: str) -> tuple[str, ...]:
        """The note of an example whose texts spell special tokens that are read as text."""
        read_as_text = source.special_tokens == "text"
        return ("special_text",) if read_as_text and any(map(self.special.search, texts)) else ()

    def hide(self, value: Any) -> Any:
        """The value with every special token in its texts broken by `BREAK`, so that a template
        can write it beside special tokens of its own; the value itself where there is none.
        """
        if not self._spells(value):
            return value
        if isinstance(value, str):
            return self.special.sub(lambda found: f"{found[0][:1]}{BREAK}{found[0][1:]}", value)
        if isinstance(value, dict):
            return {key: self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value]

    def _spells(self, value: Any) -> bool:
        """Whether a text in the value has a special token."""
        if isinstance(value, str):
            return self.special.search(value) is not None
        if isinstance(value, dict):
            value = value.values()
        elif not isinstance(value, list):
            return False
        return any(map(self._spells, value))

    def labelled(self, texts: Sequence[Labels]) -> Iterator[Labelled | SpecialText]:
        """The tokens of each rendered text, and which of them carry loss; `SpecialText` of one that
        spells a special token that the tokenizer cannot write as text.

        A token carries loss if it lies in a span, or if its part in a span is more than blanks.
        Texts are encoded many at a time.
        """
        for group in _groups(texts):
            together = [one for one in group if BREAK not in one[0]]
            made = self._labelled(together, *self._tokens([text for text, _ in together]))
            for one in group:
                if BREAK not in one[0]:
                    yield next(made)
                    continue
                try:
                    placed = self._placed(one[0])
                except SpecialText as error:
                    yield error
                else:
                    yield from self._labelled([one], placed, [len(placed[0])])

    def _labelled(
        self, texts: Sequence[Labels], tokens: Piece, counts: Sequence[int]
    ) -> Iterator[Labelled]:
        """Each of the texts, which are encoded one behind another in `tokens`."""
        text = "".join(one for one, _ in texts)
        firsts = np.cumsum([0, *map(len, (one for one, _ in texts))]).tolist()
        spans_of = [
            [(first + start, first + min(stop, len(one))) for start, stop in spans]
            for (one, spans), first in zip(texts, firsts, strict=False)
        ]
        inside = np.zeros(len(text), np.int64)
        for start, stop in chain.from_iterable(spans_of):
            inside[start:stop] = 1
        said = ~_is_blank(text)
        in_spans, words, letters = (
            np.append(0, one.cumsum()) for one in (inside, inside * said, said)
        )
        ids, starts, stops = tokens
        width = in_spans[stops] - in_spans[starts]
        mask = (words[stops] > words[starts]) | ((width > 0) & (width == stops - starts))
        solid = letters[stops] > letters[starts]
        in_order = bool((starts[:-1] <= starts[1:]).all())
        at = 0
        for count, spans in zip(counts, spans_of, strict=True):
            own = slice(at, at + count)
            at += count
            mask[own][:1] = False
            ends = []
            for start, stop in spans:
                span = own
                if in_order:
                    begin, end = (starts[own].searchsorted((start, stop)) + own.start).tolist()
                    span = slice(begin, end)
                within = (starts[span] >= start) & (stops[span] <= stop)
                within &= stops[span] > starts[span]
                last = [i for i in within.nonzero()[0][-4:] + span.start if solid[i]][-1:]
                special = last and self.special.fullmatch(text, starts[last[0]], stops[last[0]])
                ends.append(int(ids[last[0]]) if special else -1)
            yield Labelled(ids[own].copy(), mask[own].copy(), tuple(ends))

    def _placed(self, text: str) -> Piece:
        """The tokens of a rendered text with hidden special tokens.

        Raises:
            SpecialText: the tokenizer cannot write one of them as text.
        """
        plain = text.replace(BREAK, "x")
        for lead in ("", "\n"):
            if np.array_equal(self._in_pieces(plain, lead)[0], self._tokens([plain])[0][0]):
                return self._in_pieces(text, lead)
        raise SpecialText("it spells a special token, and this tokenizer cannot write it as text")

    def _in_pieces(self, text: str, lead: str) -> Piece:
        """The special tokens of a text, but for those that `BREAK` hides, and what is between them,
        each encoded by itself. Behind a `lead` no tokenizer puts a blank before the first word.
        """
        pieces, at = [], 0
        for start, stop in [*(one.span() for one in self.special.finditer(text)), (len(text),) * 2]:
            kept = np.array([i for i in range(at, start) if text[i] != BREAK] + [start])
            if len(kept) > 1:
                between = "".join(text[i] for i in kept[:-1])
                (ids, starts, stops), _ = self._tokens([between], lead if at else "")
                pieces.append((ids, kept[starts], kept[stops]))
            if stop > start:
                (ids, starts, stops), _ = self._tokens([text[start:stop]])
                pieces.append((ids, starts + start, stops + start))
            at = stop
        return _joined(pieces)

    def _tokens(self, texts: Sequence[str], lead: str | None = None) -> tuple[Piece, list[int]]:
        """(tokens, how many of them each text has), with their characters in all texts joined. With
        a `lead`, special tokens are text, and what stands before a text is encoded with it and
        taken off again.
        """
        if not texts:
            return _joined([]), []
        tokens_T = self._encoded(texts, lead)
        counts = np.array([len(ids) for ids, _ in tokens_T])
        ids = np.concatenate([ids for ids, _ in tokens_T]).astype(np.int32)
        offsets = np.concatenate([offsets for _, offsets in tokens_T])
        offsets = offsets - len(lead or "")
        firsts = np.repeat(np.cumsum([0, *map(len, texts)])[:-1], counts)
        if lead:
            kept = offsets[:, 1] > 0
            counts = np.add.reduceat(np.append(kept, 0), np.cumsum(counts) - counts)
            ids, offsets, firsts = ids[kept], offsets[kept], firsts[kept]
        starts, stops = offsets[:, 0] + firsts, offsets[:, 1] + firsts
        # Some tokenizers leave blanks out of the offsets; all tokens of a character have its own.
        before = np.maximum(np.maximum.accumulate(np.append(0, stops))[:-1], firsts)
        starts = np.minimum(np.maximum(starts, firsts), before)
        return (ids, starts, np.maximum(stops, starts)), counts.tolist()

    def _encoded(self, texts: Sequence[str], lead: str | None) -> list[Tokens]:
        """The tokens of each text; see `_tokens`."""
        if lead is not None or self.bytes is None:
            return self._with_offsets(texts, lead)
        placed = self.bytes.placed(texts)
        rest = [text for text, one in zip(texts, placed, strict=True) if one is None]
        asked = iter(self._with_offsets(rest, None) if rest else ())
        return [next(asked) if one is None else one for one in placed]

    def _with_offsets(self, texts: Sequence[str], lead: str | None) -> list[Tokens]:
        encoded = self.tokenizer(
            [(lead or "") + text for text in texts],
            add_special_tokens=False,
            split_special_tokens=lead is not None,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [
            (np.array(ids, np.int64), np.array(offsets, np.int64).reshape(-1, 2))
            for ids, offsets in pairs
        ]


def _groups(texts: Sequence[Labels]) -> Iterator[Sequence[Labels]]:
    """The texts in order, in groups of about `TOGETHER` characters."""
    first, size = 0, 0
    for number, (text, _) in enumerate(texts, start=1):
        size += len(text)
        if size >= TOGETHER or number == len(texts):
            yield texts[first:number]
            first, size = number, 0


_BLANKS = np.array([chr(code).isspace() for code in range(0x3002)])
"""Of each character up to the last blank and one behind it, whether it is a blank."""


def _is_blank(text: str) -> npt.NDArray[np.bool_]:
    """[characters], whether each is a blank."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    found: npt.NDArray[np.bool_] = _BLANKS[np.minimum(codes, len(_BLANKS) - 1)]
    return found


def _joined(pieces: Sequence[Piece]) -> Piece:
    if not pieces:
        return np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64)
    ids, starts, stops = zip(*pieces, strict=True)
    return np.concatenate(ids), np.concatenate(starts), np.concatenate(stops)


@dataclass(frozen=True)
class RowReader:
    """How the rows of one format become examples.

    `encode` gets many rows at once, because fast tokenizers encode a batch on all cores.

    Attributes:
        columns: source -> {config key: column}, the columns that a row must have.
        optional: source -> columns that are read where a row has them.
        check: (source, row) -> why a row with these columns cannot be used, or None.
        prompt: (source, row) -> the text by which two examples ask the same; the overlap of splits
            is counted by it. None where `encode` gives its key.
        encode: (encoder, source, separator, sound rows) -> one result for each row.
    """

    columns: Callable[[SourceConfig], dict[str, str]]
    check: Callable[[SourceConfig, Row], BadRow | None]
    prompt: Callable[[SourceConfig, Row], str] | None
    encode: Callable[[Encoder, SourceConfig, str, Sequence[Row]], list[Example | BadRow]]
    optional: Callable[[SourceConfig], tuple[str, ...]] = lambda source: ()


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


def _encode_texts(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    documents = encoder.encode([row.values[source.text] for row in rows], source.special_tokens)
    return [
        replace(
            example_of(row, list(encoder.prefix), [*ids, *encoder.suffix]),
            notes=encoder.notes(source, row.values[source.text]),
        )
        for row, ids in zip(rows, documents, strict=True)
    ]


TEXT = RowReader(
    columns=lambda source: {"text": source.text},
    check=lambda source, row: bad_text(row, source.text),
    prompt=lambda source, row: str(row.values[source.text]),
    encode=_encode_texts,
)
