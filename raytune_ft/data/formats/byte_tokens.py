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
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = npt.NDArray[np.int64]

_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHER = [byte for byte in range(0x100) if byte not in _PLAIN]
_BYTE = {chr(byte): byte for byte in _PLAIN} | {chr(0x100 + n): b for n, b in enumerate(_OTHER)}
"""The byte that a character of a token stands for."""
_BLANK = chr(0x100 + _OTHER.index(0x20))
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

    def encode(self, texts: Sequence[str], as_text: bool = False) -> list[list[int]]:
        """Token ids of each text. `as_text`: special tokens that it spells are text."""
        backend = self._backend
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != as_text:
            backend.encode_special_tokens = as_text
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def offsets(self, texts: Sequence[str], ids_T: Sequence[list[int]]) -> tuple[Ints, list[int]]:
        """([tokens, 2] of all texts: those of the tokenizer; the numbers of the texts whose tokens
        are not their bytes, where it would give others).
        """
        counts = np.array(list(map(len, ids_T)))
        ids = np.fromiter(chain.from_iterable(ids_T), np.int64, int(counts.sum()))
        for new in np.unique(ids[~self._known[ids]]).tolist():
            self._learn(new)
        ends = np.append(0, self._sizes[ids].cumsum())
        written = b"".join(map(self._bytes.__getitem__, ids.tolist()))
        behind = ends[counts.cumsum()]
        others = []
        begin = 0
        for number, (text, end) in enumerate(zip(texts, behind.tolist(), strict=True)):
            if written[begin:end] != text.encode():
                others.append(number)
            begin = end
        starts, stops = ends[:-1], ends[1:]
        firsts = np.repeat(np.append(0, behind)[:-1], counts)
        if not written.isascii():
            characters = ((np.frombuffer(written, np.uint8) & 0xC0) != 0x80).cumsum()
            starts, stops, firsts = (
                characters[starts] - 1,
                characters[stops - 1],
                characters[firsts] - 1,
            )
        starts, stops = starts - firsts, stops - firsts
        if self.trims:
            starts, stops = self._trimmed(ids, starts, stops)
        return np.stack([starts, stops], 1), others

    def _trimmed(self, ids: Ints, starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
        lead, trail = self._lead[ids], self._trail[ids]
        if self.keeps_first:
            lead = np.where(starts == 0, 0, lead)
        starts = np.minimum(starts + lead, stops)
        return starts, np.where(stops >= trail, np.maximum(stops - trail, starts), stops)

    def _learn(self, id: int) -> None:
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
    ids_T = tokens.encode(probes)
    offsets, others = tokens.offsets(probes, ids_T)
    found = np.array(list(chain.from_iterable(encoded["offset_mapping"])))
    same = ids_T == encoded["input_ids"] and np.array_equal(offsets, found.reshape(-1, 2))
    return tokens if same and not others else None


def _trimming(processor: Any) -> tuple[bool, bool]:
    """Whether a post-processor trims offsets, and whether it keeps a blank at the beginning."""
    state = [json.loads(processor.__getstate__())] if processor is not None else []
    for one in state:
        state += one.get("processors", ())
    found = [one for one in state if one.get("trim_offsets")]
    return bool(found), any(one.get("add_prefix_space") for one in found)
