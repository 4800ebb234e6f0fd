"""The words into which a byte-level tokenizer cuts plain text, of which each is tokenised once.

A tokenizer cuts a text at its added tokens, cuts what is between them into words by regular
expressions, and asks its model for the tokens of each word alone. Most words come again and again.
So words are found here by the same expressions, and the tokens that the model gives of each are
kept, which takes about a fifth of the time.

This is done for texts of the characters of `PLAIN`, in which all versions of Unicode agree. That
the tokenizer cuts beside each of these characters in the same way is checked.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTED]
CHARACTER = {byte: chr(byte) for byte in _PRINTED} | {
    byte: chr(0x100 + n) for n, byte in enumerate(_OTHERS)
}
"""The character that stands for a byte in the tokens of a byte-level tokenizer."""

PLAIN = "".join(map(chr, [*range(0x250), *range(0x2010, 0x2028), *range(0x2030, 0x205F)]))
"""Latin letters and common punctuation."""
KEPT = 2**18
"""Tokens of the words that are kept, which take some 30 MiB with them."""

_PROBE = "a{0}a1{0}1.{0}.'{0}e \n{0} "
"""A text that shows what a character is to an expression."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The expression of the pre-tokenizer `ByteLevel`."""
_CLASS = r"\\p\{[A-Z][a-z]?\}|\\s"
_ESCAPED = r"""\\[rnt/'"\-.\\\[\]]"""
_SYNTAX = re.compile(
    rf"(?P<brackets>\[\^?(?:{_CLASS}|{_ESCAPED}|[^\\\[\]&]|&(?!&))+\])|(?P<one>{_CLASS})"
    rf"|(?P<solid>\\S)|(?P<group>\((?!\?))|{_ESCAPED}|\(\?(?::|i:|!)|[)|]|[?*+]\+?"
    r"|\{\d+(?:,\d*)?\}(?!\+)|[^\\()\[\]{}|?*+.^$]"
)
"""The parts of the expressions that are read; those without a name mean the same to Python."""


class Unknown(Exception):
    """The tokens of a word are not its bytes."""


class Words(dict[str, int]):
    """The numbers of the words that have been met, by which their tokens are found. It is for one
    thread.
    """

    def __init__(self, backend: Any, expressions: Sequence[re.Pattern[str]], plain: str) -> None:
        """`backend`: the tokenizer. `expressions`: each cuts the words of the one before it.
        `plain`: the characters beside which the tokenizer cuts like them.
        """
        super().__init__()
        self._backend, self._expressions = backend, expressions
        by_id = backend.get_added_tokens_decoder()
        added = by_id.values()
        self._added = {one.content: id for id, one in by_id.items()}
        self._special = {one.content for one in added if one.special}
        self._odd = {one.content for one in added if one.lstrip or one.rstrip or one.single_word}
        stages = [[one.content for one in added if one.normalized is so] for so in (False, True)]
        self._cuts = [re.compile(f"({any_of(words).pattern})") for words in stages if words]
        self._plain = re.compile(f"[{_listed(plain)}]*+")
        self._forget()

    def _forget(self) -> None:
        """Begin again, with the added tokens alone."""
        self.clear()
        # Of each word the place of its first token; of each token its id and its characters.
        self._firsts, self._lengths = array("q", [0]), array("q")
        self._ids, self._starts, self._stops = array("q"), array("q"), array("q")
        for content, id in self._added.items():
            self._keep(content, [id], [0], [len(content)])

    def _keep(
        self, word: str, ids: Iterable[int], starts: Iterable[int], stops: Iterable[int]
    ) -> int:
        self._ids.extend(ids)
        self._starts.extend(starts)
        self._stops.extend(stops)
        self._firsts.append(len(self._ids))
        self._lengths.append(len(word))
        self[word] = number = len(self)
        return number

    def __missing__(self, word: str) -> int:
        """Raises Unknown."""
        mapped = "".join(map(CHARACTER.__getitem__, word.encode()))
        tokens = self._backend.model.tokenize(mapped)
        if "".join(token.value for token in tokens) != mapped:
            raise Unknown(word)
        ends = list(accumulate((len(token.value) for token in tokens), initial=0))
        starts, stops = ends[:-1], ends[1:]
        if len(mapped) > len(word):
            at = [n for n, character in enumerate(word) for _ in character.encode()]
            starts, stops = [at[start] for start in starts], [at[stop - 1] + 1 for stop in stops]
        return self._keep(word, (token.id for token in tokens), starts, stops)

    def numbers(
        self, texts: Sequence[str], as_text: bool = False
    ) -> tuple[list[Ints | None], list[str]]:
        """([words] of each text, the numbers of its words, None where the tokenizer has to be
        asked; those texts). They hold until the next call. `as_text`: special tokens that a text
        spells are text.
        """
        if len(self._ids) > KEPT:
            self._forget()
        numbers_T = [self._numbers(text, as_text) for text in texts]
        return numbers_T, [text for text, one in zip(texts, numbers_T, strict=True) if one is None]

    def _numbers(self, text: str, as_text: bool) -> Ints | None:
        if self._plain.fullmatch(text) is None:
            return None
        pieces = [text]  # every second one is an added token
        for cut in self._cuts:
            parts = ([one] if n % 2 else cut.split(one) for n, one in enumerate(pieces))
            pieces = list(chain.from_iterable(parts))
        added = pieces[1::2]
        if not self._odd.isdisjoint(added) or (as_text and not self._special.isdisjoint(added)):
            return None
        words = ([one] if n % 2 else _cut(one, self._expressions) for n, one in enumerate(pieces))
        try:
            return np.fromiter(map(self.__getitem__, chain.from_iterable(words)), np.int64)
        except Unknown:
            return None

    def placed(self, numbers_T: Sequence[Ints | None]) -> tuple[Ints, Ints, Ints, list[int]]:
        """(ids, starts, stops, ends): the tokens of all texts whose words are known, their
        characters in their texts, and the places behind the last token of each text, after a 0.
        """
        known = [one for one in numbers_T if one is not None]
        numbers = np.concatenate([np.empty(0, np.int64), *known])
        words_T = np.array(list(map(len, known)), np.int64)
        firsts, lengths = _view(self._firsts), _view(self._lengths)[numbers]
        begins = firsts[numbers]
        counts = firsts[numbers + 1] - begins
        behind, ends = lengths.cumsum(), np.append(0, counts.cumsum())
        lasts = np.append(0, words_T.cumsum())
        before = behind - lengths - np.repeat(np.append(0, behind)[lasts[:-1]], words_T)
        at = np.repeat(begins - ends[:-1], counts) + np.arange(ends[-1])
        ids, starts, stops = (_view(one)[at] for one in (self._ids, self._starts, self._stops))
        before = np.repeat(before, counts)
        return ids, starts + before, stops + before, ends[lasts].tolist()


def _cut(text: str, expressions: Iterable[re.Pattern[str]]) -> list[str]:
    """The words of a text without added tokens."""
    words = [text]
    for expression in expressions:
        words = list(chain.from_iterable(map(expression.findall, words)))
    return words


def _view(numbers: array[int]) -> Ints:
    """The same memory; while it is there, nothing can be added."""
    return np.frombuffer(numbers, np.int64)


def words_of(backend: Any) -> Words | None:
    """None if the tokenizer cuts texts in another way than by the expressions that are read here,
    or its tokens of a word are drawn.
    """
    expressions = _expressions(_state(backend.pre_tokenizer))
    model, added = backend.model, backend.get_added_tokens_decoder().values()
    if (
        expressions is None
        or type(model).__name__ != "BPE"
        or model.dropout
        or not _keeps_plain(_state(backend.normalizer))
        or len({one.content for one in added}) < len(added)
    ):
        return None
    plain = "".join(one for one in PLAIN if _is_cut_alike(one, backend.pre_tokenizer, expressions))
    return Words(backend, expressions, plain) if plain else None


def _is_cut_alike(character: str, cutter: Any, expressions: Iterable[re.Pattern[str]]) -> bool:
    """Whether a pre-tokenizer cuts beside a character as the expressions do."""
    text = _PROBE.format(character)
    places = (place for _, place in cutter.pre_tokenize_str(text))
    return _cut(text, expressions) == [text[start:stop] for start, stop in places]


def _state(part: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as its file has it."""
    return None if part is None else json.loads(part.__getstate__())


def _keeps_plain(normalizer: dict[str, Any] | None) -> bool:
    """Whether it leaves texts of `PLAIN` as they are."""
    if normalizer is None:
        return True
    if normalizer["type"] == "Sequence":
        return all(map(_keeps_plain, normalizer["normalizers"]))
    return normalizer["type"] == "NFC" and unicodedata.is_normalized("NFC", PLAIN)


def _expressions(cutter: dict[str, Any] | None) -> list[re.Pattern[str]] | None:
    """What each step of a pre-tokenizer cuts a text into; None if that is no expression."""
    if cutter is None:
        return None
    *before, last = cutter["pretokenizers"] if cutter["type"] == "Sequence" else [cutter]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    found = list[str | None]()
    for one in before:
        if one["type"] == "Digits":
            found.append(_in_python(r"\p{N}" if one["individual_digits"] else r"\p{N}+"))
        elif one["type"] == "Split" and one["behavior"] == "Isolated" and not one["invert"]:
            text = one["pattern"].get("String")
            found.append(_in_python(one["pattern"]["Regex"]) if text is None else re.escape(text))
        else:
            return None
    if last["use_regex"]:
        found.append(_in_python(_GPT2))
    patterns = [one for one in found if one is not None]
    if len(patterns) < len(found):
        return None
    # What an expression does not match is a word as well.
    compiled = [re.compile(rf"{one}|(?:(?!{one})[\s\S])+") for one in patterns]
    return None if any(one.match("") for one in compiled) else compiled


def _in_python(expression: str) -> str | None:
    """The expression for texts of `PLAIN`; None if it has a part that is not read."""
    parts, at = list[str](), 0
    while at < len(expression):
        found = _SYNTAX.match(expression, at)
        if found is None:
            return None
        part = found[0]
        if found["brackets"]:
            part = re.sub(_CLASS, lambda one: _members(one[0]), part)
        elif found["one"] or found["solid"]:
            part = f"[{'^' if found['solid'] else ''}{_members(part)}]"
        elif found["group"]:
            part = "(?:"
        parts.append(part)
        at = found.end()
    made = "".join(parts)
    try:
        re.compile(made)
    except re.error:
        return None
    return made


def _members(of: str) -> str:
    r"""The characters of `PLAIN` of a class, such as `\p{L}` or `\s`, as brackets list them."""
    if of.lower() == r"\s":
        return _listed(one for one in PLAIN if one.isspace() and not "\x1c" <= one <= "\x1f")
    name = of[3:-1]
    return _listed(one for one in PLAIN if unicodedata.category(one).startswith(name))


def _listed(characters: Iterable[str]) -> str:
    return "".join(f"\\u{ord(one):04x}" for one in characters)


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches each of the words, the longest first; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")
