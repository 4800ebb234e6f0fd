"""The words of plain texts have the tokens that the tokenizer gives of the whole text."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from raytune_ft.data.formats import words
from raytune_ft.data.formats.words import PLAIN, Words, words_of

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001 - as its file has it
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
GAPS = (r"[aeiou]+",)
"""An expression that leaves most of a text to no match."""


def split(*expressions: str) -> Any:
    cuts = [pre_tokenizers.Split(Regex(one), "isolated") for one in expressions]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, level])


GPT2: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTTERS: dict[str, Any] = {
    "gpt2": GPT2,
    "llama3": split(LLAMA),
    "gpt4o": split(GPT4O),
    "deepseek": split(*DEEPSEEK),
    "gaps": split(*GAPS),
    "starcoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
}
PIECES = (
    *("question", "IT'S", "we'll", "x=1", "a/b", "12345", "café", "\u017fo", "İl", "½²", "<", "<s"),
    *("don\u2019t", "\u2014", "...", "</s>", "<s>", "<|im_end|>", "river house", "riverside", "'"),
    *("\r\n", "\n\n", "\t", "  ", "\u00a0", "\x1c", "\x85", "#!?", "[0](b)"),
)


def tokenizer(cutter: Any, **flags: bool) -> Tokenizer:
    """A tokenizer trained on the pieces; `flags` are those of its special tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = cutter
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(word, **flags) for word in ("<s>", "</s>", "<|im_end|>")],  # type: ignore[list-item]
    )
    made.train_from_iterator([" ".join(PIECES) * 3, *PIECES], trainer)
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("river house")])
    return made


def texts(count: int, plain: bool = True) -> list[str]:
    draw = random.Random(0)
    pieces = PIECES if plain else (*PIECES, "日本", "e\u0301", "\u2003")
    return [
        "".join(
            word + draw.choice(["", " "]) for word in draw.choices(pieces, k=draw.randint(0, 30))
        )
        for _ in range(count)
    ]


def encoded(made: Tokenizer, text: str, as_text: bool = False) -> Any:
    made.encode_special_tokens = as_text
    return made.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", CUTTERS)
def test_tokens_and_places_are_those_of_the_tokenizer(name: str) -> None:
    made = tokenizer(CUTTERS[name])
    found = words_of(made)
    assert found is not None
    given = texts(400)
    numbers_T, asked = found.numbers(given)
    assert not asked
    ids, starts, stops, ends = found.placed(numbers_T)
    whole = [encoded(made, text) for text in given]
    assert ends == np.cumsum([0, *(len(one.ids) for one in whole)]).tolist()
    assert ids.tolist() == [id for one in whole for id in one.ids]
    places = [place for one in whole for place in one.offsets]
    assert np.array_equal(np.stack([starts, stops], 1), places)


def test_special_tokens_that_are_text_are_left_to_the_tokenizer() -> None:
    made = tokenizer(GPT2)
    found = words_of(made)
    assert found is not None
    given = texts(400)
    numbers_T, asked = found.numbers(given, as_text=True)
    special = ("<s>", "</s>", "<|im_end|>")
    assert asked == [text for text in given if any(word in text for word in special)]
    assert 50 < len(asked) < 350
    ids = found.placed(numbers_T)[0].tolist()
    known = [text for text, one in zip(given, numbers_T, strict=True) if one is not None]
    assert ids == [id for text in known for id in encoded(made, text, as_text=True).ids]


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_depend_on_what_is_beside_them(flag: str) -> None:
    found = words_of(tokenizer(GPT2, **{flag: True}))
    assert found is not None
    assert found.numbers(["one <s> two", "one two"])[1] == ["one <s> two"]


def test_other_characters_are_left_to_the_tokenizer() -> None:
    found = words_of(tokenizer(GPT2))
    assert found is not None
    given = ["plain \u2014 caf\u00e9", "日本", "cafe\u0301", "", "a\u2003b", "\ufdd0"]
    assert found.numbers(given)[1] == [given[1], given[2], given[4], given[5]]


def test_a_character_at_which_the_tokenizer_cuts_otherwise_is_not_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everything = words_of(tokenizer(GPT2))
    members = words._members
    monkeypatch.setattr(words, "_members", lambda of: "A-Za-z" if of == r"\p{L}" else members(of))
    some = words_of(tokenizer(GPT2))
    assert everything is not None
    assert some is not None
    assert all(one is not None for one in everything.numbers(list(PLAIN))[0])
    assert some.numbers(["naive", "na\u00efve"])[1] == ["na\u00efve"]


def test_words_are_forgotten_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer(GPT2)
    found = words_of(made)
    assert found is not None
    monkeypatch.setattr(words, "KEPT", 50)
    for text in texts(60):
        numbers_T, _ = found.numbers([text])
        assert found.placed(numbers_T)[0].tolist() == encoded(made, text).ids
        assert len(found) < 100


@pytest.mark.parametrize(
    "change",
    [
        lambda made: setattr(made, "normalizer", normalizers.NFKC()),
        lambda made: setattr(made, "normalizer", normalizers.Lowercase()),
        lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.ByteLevel()),
        lambda made: setattr(made, "pre_tokenizer", split(r"\w+")),
        lambda made: setattr(made, "pre_tokenizer", split(r"(?<=a)b")),
        lambda made: setattr(made, "pre_tokenizer", split(r"x*")),
        lambda made: setattr(made.model, "dropout", 0.1),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(change: Any) -> None:
    made = tokenizer(GPT2)
    assert isinstance(words_of(made), Words)
    change(made)
    assert words_of(made) is None
