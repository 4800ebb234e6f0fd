"""Rewards that come with the package. Scores are between -1 and 1."""

from __future__ import annotations

import re

from raytune_ft.config.rewards import (
    ExactMatch,
    Format,
    Gsm8k,
    Length,
    Math,
    Regex,
    Repetition,
)
from raytune_ft.rewards.base import Group, Refused, Scorer, each, reference_of

_GSM8K = re.compile(r"####\s*\$?(-?[\d.,]*\d)")


def exact_match(config: ExactMatch) -> Scorer:
    """1 where the completion is the right answer, blanks around them aside."""
    return each(
        lambda group, i: float(group.completions[i].strip() == reference_of(group, config.column)),
        [config.column],
    )


def regex(config: Regex) -> Scorer:
    """1 where the pattern is found."""
    pattern = re.compile(config.pattern)
    return each(lambda group, i: float(pattern.search(group.completions[i]) is not None))


def tagged(config: Format) -> Scorer:
    """1 where the completion is one element of each tag in order (as in arXiv 2501.12948)."""
    whole = re.compile(
        r"\s*".join(rf"<{re.escape(tag)}>.*?</{re.escape(tag)}>" for tag in config.tags), re.S
    )
    tags = [f"{start}{tag}>" for tag in config.tags for start in ("<", "</")]

    def score(group: Group, i: int) -> float:
        text = group.completions[i].strip()
        once = all(text.count(tag) == 1 for tag in tags)
        return float(once and whole.fullmatch(text) is not None)

    return each(score)


def length(config: Length) -> Scorer:
    """Of the tokens of a completion: near a target, or DAPO's soft overlong punishment (arXiv
    2503.14476, equation 13).
    """

    def score(group: Group, i: int) -> float:
        tokens = len(group.completion_ids[i])
        if config.target is not None:
            return max(0.0, 1 - abs(tokens - config.target) / config.target)
        assert config.limit is not None
        over = tokens - (config.limit - config.buffer)
        return -min(1.0, max(0.0, over / config.buffer))

    return each(score)


def repetition(config: Repetition) -> Scorer:
    """Minus the share of n-grams of words that occurred before (arXiv 2502.03373)."""

    def score(group: Group, i: int) -> float:
        words = group.completions[i].lower().split()
        phrases = list(zip(*(words[start:] for start in range(config.ngram)), strict=False))
        return len(set(phrases)) / len(phrases) - 1 if phrases else 0.0

    return each(score)


def gsm8k(config: Gsm8k) -> Scorer:
    """1 where the last `#### NUMBER` of both is one number (arXiv 2110.14168)."""

    def score(group: Group, i: int) -> float:
        wanted = _number(reference_of(group, config.column))
        if wanted is None:
            raise ValueError("the right answer has no `#### NUMBER`")
        return float(_number(group.completions[i]) == wanted)

    return each(score, [config.column])


def _number(text: str) -> float | None:
    found = _GSM8K.findall(text)
    try:
        return float(found[-1].replace(",", "")) if found else None
    except ValueError:  # such as 1.2.3
        return None


def math(config: Math) -> Scorer:
    """1 where math-verify finds both answers equal. Its own time limits are off: the process of the
    reward has one.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise Refused(
            "needs math-verify, which is not installed", "pip install 'raytune-ft[math]'"
        ) from None

    def score(group: Group, i: int) -> float:
        wanted = parse(reference_of(group, config.column), parsing_timeout=None)
        if not wanted:
            raise ValueError("math-verify finds no answer in the right answer")
        said = parse(group.completions[i], parsing_timeout=None)
        return float(verify(wanted, said, timeout_seconds=None))

    return each(score, [config.column])
