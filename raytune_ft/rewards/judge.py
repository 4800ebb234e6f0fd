"""A judge behind an OpenAI-compatible endpoint; each question is asked once and its answer kept.

Two completions are compared in both orders, since judges prefer a place (arXiv 2306.05685); where
the answers disagree it is a tie.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Generator, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from raytune_ft.config.environment import HIDDEN, without_secrets
from raytune_ft.config.rewards import Judge
from raytune_ft.rewards.base import WORKING, Group, Refused, Score, Scorer, Yielded

FIRST_ANSWER_S = 8.0
"""How long the first question may take."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses of HTTP after which a question is asked again."""
DISAGREEMENTS = "comparisons whose two orders disagree"
"""What their number is called among the counts of a run."""

GRADE = """\
Grade an answer by this criterion: {criterion}.

[Question]
{prompt}
[End of question]

[Answer]
{answer}
[End of answer]

Reply with one number from 0 (worst) to 1 (best) and nothing else."""
PAIR = """\
Compare two answers by this criterion: {criterion}.

[Question]
{prompt}
[End of question]

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]

Reply with A if answer A is better, B if answer B is better, or TIE, and nothing else."""
_NUMBER = re.compile(r"(?<![\d.])(?:0?\.\d+|0|1(?:\.0+)?|0\.\d*)(?![\d.]*\d)")
_CHOICE = re.compile(r"\b(A|B|TIE)\b")


class NoAnswer(Exception):
    """The judge gave none, or one that cannot be read. `again`: it may help to ask again."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class Asked:
    """The judge's answers: those that are kept in a file, and those that are asked for."""

    def __init__(self, config: Judge) -> None:
        assert config.answers is not None
        folder = Path(config.answers)
        folder.mkdir(parents=True, exist_ok=True)
        self._config = config
        named = f"{config.url} {config.model} {config.max_tokens}"
        self._file = folder / f"judge-{hashlib.sha256(named.encode()).hexdigest()[:16]}.jsonl"
        self._kept: dict[str, str] = {}
        self._opener = urllib.request.build_opener(_NoRedirect)
        if self._file.is_file():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                try:
                    one = json.loads(line)
                    self._kept[one["question"]] = one["answer"]
                except (ValueError, KeyError, TypeError):  # a line that was cut short
                    continue

    def find(self, question: str, counts: Counter[str]) -> Iterator[Yielded]:
        """Make sure that `answer(question)` is there, with signs of life between attempts.

        Raises:
            NoAnswer: it is not, after all attempts.
        """
        if self._key(question) in self._kept:
            counts["answers kept from earlier"] += 1
            return
        for attempt in range(self._config.retries + 1):
            yield WORKING
            try:
                self._keep(question, self.ask(question, self._config.timeout_s))
            except NoAnswer as error:
                if attempt == self._config.retries or not error.again:
                    raise
                counts["questions asked again"] += 1
                time.sleep(min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))
            else:
                counts["questions"] += 1
                return

    def answer(self, question: str) -> str:
        """The answer that is kept."""
        return self._kept[self._key(question)]

    def ask(self, question: str, timeout_s: float) -> str:
        """One attempt. Raises NoAnswer."""
        config = self._config
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": config.max_tokens,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if config.api_key:
            headers["Authorization"] = f"Bearer {config.api_key}"
        request = urllib.request.Request(
            f"{config.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with self._opener.open(request, timeout=timeout_s) as reply:
                said = json.load(reply)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            raise self._failed(f"HTTP {error.code}", error.code in AGAIN) from None
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            reason = getattr(error, "reason", None) or error
            raise self._failed(str(reason) or type(error).__name__, True) from None
        if not isinstance(said, str):
            raise self._failed("a reply without text", True)
        return said

    def _failed(self, reason: str, again: bool) -> NoAnswer:
        text = without_secrets(reason)
        return NoAnswer(text.replace(self._config.api_key or "\0", HIDDEN), again)

    def _key(self, question: str) -> str:
        return hashlib.sha256(question.encode(errors="surrogatepass")).hexdigest()

    def _keep(self, question: str, answer: str) -> None:
        """One write to the end of the file, so that several processes may keep answers in it."""
        self._kept[self._key(question)] = answer
        line = json.dumps({"question": self._key(question), "answer": answer}) + "\n"
        file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)


def judged(config: Judge) -> Scorer:
    """Grades, or shares of won comparisons.

    Raises:
        Refused: the judge does not answer a first question.
    """
    asked = Asked(config)
    try:
        asked.ask("Reply with 1.", min(config.timeout_s, FIRST_ANSWER_S))
    except NoAnswer as error:
        raise Refused(
            f"has a judge, {without_secrets(config.url)}, that does not answer ({error})",
            "start it or correct url, model and api_key, or leave the judge out",
        ) from None
    rate = _grades if config.mode == "grade" else _wins
    return Scorer(lambda group: rate(config, asked, group), together=config.mode == "pairs")


def _grades(config: Judge, asked: Asked, group: Group) -> Iterator[Yielded]:
    counts = Counter[str]()
    for completion in group.completions:
        question = GRADE.format(
            criterion=config.criterion, prompt=group.prompt, answer=completion.strip()
        )
        try:
            yield from asked.find(question, counts)
            yield _grade(asked.answer(question))
        except NoAnswer as error:
            yield Score(None, f"NoAnswer: {error}")
    yield counts


def _grade(reply: str) -> float:
    found = _NUMBER.findall(reply)
    if not found:
        raise NoAnswer(f"the reply {reply.strip()[:40]!r} has no number from 0 to 1")
    return float(found[-1])


def _wins(config: Judge, asked: Asked, group: Group) -> Iterator[Yielded]:
    """For each completion the share of the others that it beats, a tie being half of one."""
    said, counts = [text.strip() for text in group.completions], Counter[str]()
    won: list[list[float]] = [[] for _ in said]
    why = "NoAnswer: there is no other completion"
    for first, second in combinations(range(len(said)), 2):
        try:
            share = 0.5
            if said[first] != said[second]:
                share = yield from _share(config, asked, group, said[first], said[second], counts)
            won[first].append(share)
            won[second].append(1 - share)
        except NoAnswer as error:
            why = f"NoAnswer: {error}"
    for shares in won:
        yield sum(shares) / len(shares) if shares else Score(None, why)
    yield counts


def _share(
    config: Judge, asked: Asked, group: Group, first: str, second: str, counts: Counter[str]
) -> Generator[Yielded, None, float]:
    """Returns 1 where `first` wins in both orders, 0 where `second` does, else 0.5."""
    choices = []
    for a, b in ((first, second), (second, first)):
        question = PAIR.format(criterion=config.criterion, prompt=group.prompt, first=a, second=b)
        yield from asked.find(question, counts)
        reply = asked.answer(question)
        found = _CHOICE.findall(reply.upper())
        if not found:
            raise NoAnswer(f"the reply {reply.strip()[:40]!r} names none of A, B and TIE")
        choices.append(found[-1])
    counts["comparisons"] += 1
    if choices == ["A", "B"]:
        return 1.0
    if choices == ["B", "A"]:
        return 0.0
    counts[DISAGREEMENTS] += choices[0] == choices[1] != "TIE"
    return 0.5
