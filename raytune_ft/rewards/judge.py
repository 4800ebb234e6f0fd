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
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from threading import Event, Lock
from typing import Any

from raytune_ft.config.environment import HIDDEN, without_secrets
from raytune_ft.config.rewards import Judge
from raytune_ft.rewards.base import WORKING, Group, Refused, Score, Scorer, Yielded, at_once

FIRST_ANSWER_S = 8.0
"""How long the first question may take."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
BEAT_S = 1.0
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses of HTTP after which a question is asked again."""
DISAGREEMENTS = "comparisons whose two orders disagree"
"""What their number is called among the counts of a run, and what is said beside their scores."""

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
        self._counts, self._lock = Counter[str](), Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)
        if self._file.is_file():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                try:
                    one = json.loads(line)
                    self._kept[one["question"]] = one["answer"]
                except (ValueError, KeyError, TypeError):  # a line that was cut short
                    continue

    def find(self, question: str, alive: Event) -> str:
        """The answer, which is kept; sets `alive` before each attempt. Threads may call it.

        Raises:
            NoAnswer: there is none, after all attempts.
        """
        kept = self._kept.get(self._key(question))
        if kept is not None:
            self._count("answers kept from earlier")
            return kept
        for attempt in range(self._config.retries + 1):
            alive.set()
            try:
                answer = self.ask(question, self._config.timeout_s)
            except NoAnswer as error:
                if attempt == self._config.retries or not error.again:
                    raise
                self._count("questions asked again")
                time.sleep(min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))
            else:
                self._keep(question, answer)
                self._count("questions")
                return answer
        raise AssertionError("the last attempt gives or raises")

    @contextmanager
    def finding(self, questions: Iterable[str]) -> Iterator[Replies]:
        """Find the answers to all questions, `at_once` of them at the same time."""
        alive = Event()
        threads = ThreadPoolExecutor(self._config.at_once)
        try:
            found = {
                question: threads.submit(self.find, question, alive)
                for question in dict.fromkeys(questions)
            }
            yield Replies(found, alive)
        finally:
            threads.shutdown(cancel_futures=True)

    def counts(self) -> Counter[str]:
        """What was counted since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

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


@dataclass(frozen=True)
class Replies:
    """Answers that are on their way."""

    found: Mapping[str, Future[str]]
    alive: Event

    def to(self, question: str) -> Generator[Yielded, None, str]:
        """The answer; until it is there, a sign of life where any question is being asked.

        Raises:
            NoAnswer: see `Asked.find`.
        """
        reply = self.found[question]
        while not reply.done():
            wait([reply], BEAT_S)
            if self.alive.is_set():
                self.alive.clear()
                yield WORKING
        return reply.result()


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
    if config.compares:
        return at_once(partial(_wins, config, asked), together=True)
    return at_once(partial(_grades, config, asked))


def _grades(config: Judge, asked: Asked, groups: Sequence[Group]) -> Iterator[Yielded]:
    questions = [
        GRADE.format(criterion=config.criterion, prompt=group.prompt, answer=completion.strip())
        for group in groups
        for completion in group.completions
    ]
    with asked.finding(questions) as replies:
        for question in questions:
            try:
                yield _grade((yield from replies.to(question)))
            except NoAnswer as error:
                yield Score(None, f"NoAnswer: {error}")
    yield asked.counts()


def _grade(reply: str) -> float:
    found = _NUMBER.findall(reply)
    if not found:
        raise NoAnswer(f"the reply {reply.strip()[:40]!r} has no number from 0 to 1")
    return float(found[-1])


def _wins(config: Judge, asked: Asked, groups: Sequence[Group]) -> Iterator[Yielded]:
    """For each completion the share of the others that it beats, a tie being half of one. A score
    says where the two orders of one of its comparisons disagreed.
    """
    counts = Counter[str]()
    with asked.finding(_all_questions(config, groups)) as replies:
        for group in groups:
            yield from _wins_of(config, group, replies, counts)
    yield asked.counts() + counts


def _all_questions(config: Judge, groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        said = [text.strip() for text in group.completions]
        for first, second in combinations(said, 2):
            if first != second:
                yield from _both_orders(config, group, first, second)


def _both_orders(config: Judge, group: Group, first: str, second: str) -> list[str]:
    return [
        PAIR.format(criterion=config.criterion, prompt=group.prompt, first=a, second=b)
        for a, b in ((first, second), (second, first))
    ]


def _wins_of(
    config: Judge, group: Group, replies: Replies, counts: Counter[str]
) -> Iterator[Yielded]:
    said = [text.strip() for text in group.completions]
    won: list[list[float]] = [[] for _ in said]
    split = [""] * len(said)
    why = "NoAnswer: there is no other completion"
    for first, second in combinations(range(len(said)), 2):
        share = 0.5
        if said[first] != said[second]:
            questions = _both_orders(config, group, said[first], said[second])
            try:
                choices = []
                for question in questions:
                    choices.append(_choice((yield from replies.to(question))))
            except NoAnswer as error:
                why = f"NoAnswer: {error}"
                continue
            counts["comparisons"] += 1
            share = {"AB": 1.0, "BA": 0.0}.get("".join(choices), 0.5)
            if choices[0] == choices[1] != "TIE":
                counts[DISAGREEMENTS] += 1
                split[first] = split[second] = DISAGREEMENTS
        won[first].append(share)
        won[second].append(1 - share)
    for shares, note in zip(won, split, strict=True):
        yield Score(sum(shares) / len(shares), note) if shares else Score(None, why)


def _choice(reply: str) -> str:
    """Raises NoAnswer where there is none."""
    found = _CHOICE.findall(reply.upper())
    if not found:
        raise NoAnswer(f"the reply {reply.strip()[:40]!r} names none of A, B and TIE")
    return str(found[-1])
