"""Tokens of byte-level tokenizers stand where the tokenizer says that they do."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest
from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerBase

from raytune_ft.data.formats import Encoder
from raytune_ft.data.formats.byte_tokens import byte_tokens
from tests.unit.data.formats.test_templates import byte_tokenizer

PIECES = (
    *("the", "of", "model", "Ünïcode", "日本", "👍🏽", "straße", "İ", "tab\tto", "green\n\nline"),
    *("", "</s>", "<|im_end|>", "<s>", "it's", "x=1", "e\u0301", "\u00a0", "\u2003"),
)


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    some = [" ".join(draw.choices(PIECES, k=draw.randint(0, 20))) for _ in range(count)]
    return [text + draw.choice(["", " ", "\n", "  "]) for text in some]


@pytest.mark.parametrize("trimmed", [None, (False, False), (True, False), (True, True)])
def test_offsets_are_those_of_the_tokenizer(
    tiny: PreTrainedTokenizerBase, trimmed: tuple[bool, bool] | None
) -> None:
    for tokenizer in (tiny, byte_tokenizer("<|im_end|>")):
        if trimmed is not None:
            processor = processors.ByteLevel(trim_offsets=trimmed[0], add_prefix_space=trimmed[1])  # type: ignore[call-arg]
            tokenizer.backend_tokenizer.post_processor = processor
        tokens = byte_tokens(tokenizer)
        assert tokens is not None
        encoded = tokenizer(texts(500), add_special_tokens=False, return_offsets_mapping=True)
        assert tokens.encode(texts(500)) == encoded["input_ids"]
        placed_T = tokens.placed(texts(500))
        ids_T, offsets_T = zip(*(one for one in placed_T if one is not None), strict=True)
        assert [ids.tolist() for ids in ids_T] == encoded["input_ids"]
        given = list(chain.from_iterable(encoded["offset_mapping"]))
        assert np.array_equal(np.concatenate(offsets_T), given)


def test_text_that_the_tokenizer_changes_is_asked_for(tiny: PreTrainedTokenizerBase) -> None:
    given = ["caf\u0065\u0301 au lait", "plain words", "\u212b unit", ""]
    tiny.backend_tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokens = byte_tokens(tiny)
    assert tokens is not None
    assert [one is None for one in tokens.placed(given)] == [True, False, True, False]
    encoder = Encoder.of(tiny)
    spans = [(text, [(2, len(text))]) for text in given]
    together = list(encoder.labelled(spans))
    vars(encoder)["bytes"] = None  # as of a tokenizer that is not byte-level
    asked = list(encoder.labelled(spans))
    for one, other in zip(together, asked, strict=True):
        assert not isinstance(one, Exception)
        assert not isinstance(other, Exception)
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.mask, other.mask)


def test_a_tokenizer_that_is_not_byte_level_is_asked(stories: PreTrainedTokenizerBase) -> None:
    assert byte_tokens(stories) is None
