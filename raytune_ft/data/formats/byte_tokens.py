"""Where tokens stand in a text, by their bytes.

The tokens of a byte-level tokenizer are the bytes of the text, so where each stands follows from
their sizes. The tokenizer is then not asked for offsets, which take about a third of its time. That
the tokens of a text are its bytes is checked for each text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from raytune_ft.data.formats.words import CHARACTER, Ints, words_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[Ints, Ints]
"""(ids [tokens], offsets [tokens, 2])."""

_BYTE = {character: byte for byte, character in CHARACTER.items()}
"""The byte that a character of a token stands for."""
_BLANK = CHARACTER[0x20]
_NO_TEXT = b"\xff"
"""Bytes of a token that is no bytes of a text; not in UTF-8."""

PROBES = (
    "The  quick\n\n  brown fox's 12 jumps.\t",
    " Ünïcode 日本語 👍🏽 straße\u00a0x \r\n ",
    "\n",
    "   ",
    "a",
)
"""Texts by which the places are compared with the offsets of the tokenizer."""


class ByteTokens:
    """The tokens of one byte-level tokenizer, of which each is looked up once.

    Attributes:
        trims: its offsets leave out the blanks around a token, `keeps_first` but for one at the
            beginning.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        self._added = {id: one.content for id, one in tokenizer.added_tokens_decoder.items()}
        count = max([len(tokenizer), *self._added]) + 1
        self._bytes: list[bytes] = [b""] * count
        self._known = np.zeros(count, np.bool_)
        self._sizes, self._lead, self._trail = (np.zeros(count, np.int64) for _ in range(3))
        self.trims, self.keeps_first = _trimming(self._backend.post_processor)
        self._words = words_of(self._backend)

    def encode(self, texts: Sequence[str], as_text: bool = False) -> list[list[int]]:
        """Token ids of each text. `as_text`: special tokens that it spells are text."""
        if self._words is None:
            return self._asked(texts, as_text)
        numbers_T, rest = self._words.numbers(texts, as_text)
        ids, _, _, ends = self._words.placed(numbers_T)
        flat = ids.tolist()
        known = (flat[start:stop] for start, stop in pairwise(ends))
        asked = iter(self._asked(rest, as_text))
        return [next(asked if one is None else known) for one in numbers_T]

    def placed(self, texts: Sequence[str]) -> list[Tokens | None]:
        """The tokens of each text, with the offsets that the tokenizer gives; None of a text whose
        tokens are not its bytes, where it would give others.
        """
        if self._words is None:
            return self._asked_places(texts)
        numbers_T, rest = self._words.numbers(texts)
        ids, starts, stops, ends = self._words.placed(numbers_T)
        offsets = self._offsets(ids, starts, stops)
        known = ((ids[start:stop], offsets[start:stop]) for start, stop in pairwise(ends))
        asked = iter(self._asked_places(rest))
        return [next(asked if one is None else known) for one in numbers_T]

    def _asked(self, texts: Sequence[str], as_text: bool = False) -> list[list[int]]:
        """Token ids of each text, by the tokenizer."""
        if not texts:
            return []
        backend = self._backend
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != as_text:
            backend.encode_special_tokens = as_text
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def _asked_places(self, texts: Sequence[str]) -> list[Tokens | None]:
        """See `placed`."""
        if not texts:
            return []
        ids_T = self._asked(texts)
        counts = np.array(list(map(len, ids_T)))
        ids = np.fromiter(chain.from_iterable(ids_T), np.int64, int(counts.sum()))
        self._learn(ids)
        ends = np.append(0, self._sizes[ids].cumsum())
        written = b"".join(map(self._bytes.__getitem__, ids.tolist()))
        lasts = np.append(0, counts.cumsum())
        behind = ends[lasts]
        starts, stops = ends[:-1], ends[1:]
        firsts = np.repeat(behind[:-1], counts)
        if not written.isascii():
            characters = ((np.frombuffer(written, np.uint8) & 0xC0) != 0x80).cumsum()
            starts, stops, firsts = (
                characters[starts] - 1,
                characters[stops - 1],
                characters[firsts] - 1,
            )
        offsets = self._offsets(ids, starts - firsts, stops - firsts)
        return [
            (ids[start:stop], offsets[start:stop]) if written[begin:end] == text.encode() else None
            for text, (start, stop), (begin, end) in zip(
                texts, pairwise(lasts.tolist()), pairwise(behind.tolist()), strict=True
            )
        ]

    def _offsets(self, ids: Ints, starts: Ints, stops: Ints) -> Ints:
        """[tokens, 2] from the characters of tokens in their texts."""
        if self.trims:
            self._learn(ids)
            starts, stops = self._trimmed(ids, starts, stops)
        return np.stack([starts, stops], 1)

    def _trimmed(self, ids: Ints, starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
        lead, trail = self._lead[ids], self._trail[ids]
        if self.keeps_first:
            lead = np.where(starts == 0, 0, lead)
        starts = np.minimum(starts + lead, stops)
        return starts, np.where(stops >= trail, np.maximum(stops - trail, starts), stops)

    def _learn(self, ids: Ints) -> None:
        for new in np.unique(ids[~self._known[ids]]).tolist():
            self._learn_one(new)

    def _learn_one(self, id: int) -> None:
        token = self._added.get(id)
        if token is not None:
            raw = token.encode()
        else:
            token = self._backend.id_to_token(id) or ""
            known = token and all(map(_BYTE.__contains__, token))
            raw = bytes(map(_BYTE.__getitem__, token)) if known else _NO_TEXT
        blank = [character == _BLANK or character.isspace() for character in token]
        self._bytes[id], self._sizes[id] = raw, len(raw)
        self._lead[id] = (*blank, False).index(False)
        self._trail[id] = (*reversed(blank), False).index(False)
        self._known[id] = True


def byte_tokens(tokenizer: PreTrainedTokenizerBase) -> ByteTokens | None:
    """None if the tokenizer is not byte-level, or has other offsets than its bytes give."""
    if not tokenizer.is_fast:
        return None
    tokens = ByteTokens(tokenizer)
    words = tokenizer.all_special_tokens
    probes = [*PROBES, *(f"{a}{word} {b}" for a, b in pairwise(PROBES) for word in words)]
    encoded = tokenizer(
        probes, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True
    )
    placed = tokens.placed(probes)
    for one, ids, offsets in zip(
        placed, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        if one is None or one[0].tolist() != ids or one[1].tolist() != list(map(list, offsets)):
            return None
    return tokens


def _trimming(processor: Any) -> tuple[bool, bool]:
    """Whether a post-processor trims offsets, and whether it keeps a blank at the beginning."""
    state = [json.loads(processor.__getstate__())] if processor is not None else []
    for one in state:
        state += one.get("processors", ())
    found = [one for one in state if one.get("trim_offsets")]
    return bool(found), any(one.get("add_prefix_space") for one in found)
