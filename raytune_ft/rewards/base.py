"""What a reward gets and gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raytune_ft.errors import InputError


@dataclass(frozen=True)
class Group:
    """A prompt and everything that a model said to it. It is JSON on the way to a process.

    Attributes:
        origin: the row, such as `test.jsonl:12`, for messages.
        prompt: the text that the model was given, without special tokens and blanks around it.
        turns: the same as a conversation, where it is one.
        text: the prompt as the row has it; None where it is a conversation.
        reference: the completion of the row; empty where it has none.
        completions: [n] texts without special tokens.
        completion_ids: [n] token ids, the end token included.
        columns: the values of the row.
    """

    origin: str
    prompt: str
    reference: str
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Any] = field(default_factory=dict)
    turns: Sequence[Mapping[str, Any]] | None = None
    text: str | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """Its keys and values."""
        return asdict(self)

    def against(self, number: int, text: str) -> Group:
        """One of the completions and another text, for a judge that compares."""
        both = [self.completions[number], text]
        ids = [self.completion_ids[number], ()]
        return Group(**{**vars(self), "completions": both, "completion_ids": ids})

    def after(self, first: int) -> Group:
        """The group without its first completions."""
        return Group(
            **{
                **vars(self),
                "completions": self.completions[first:],
                "completion_ids": self.completion_ids[first:],
            }
        )


@dataclass(frozen=True)
class Score:
    """The score of one completion; None where it could not be computed, and why. With a score `why`
    is a note on it.
    """

    value: float | None
    why: str = ""


class Working:
    """Yielded by a reward that needs longer than its time limit, and is at work."""


WORKING = Working()

Yielded = float | int | None | Score | Working | Counter[str]
"""A score; or a sign of life; or numbers to be added up over the run, by their names."""
Rate = Callable[[Group], Iterator[Yielded]]
RateAll = Callable[[Sequence[Group]], Iterator[Yielded]]


@dataclass(frozen=True)
class Scorer:
    """A reward that is ready.

    Attributes:
        rate: gives the scores of a group in their order.
        columns: what it needs of each row.
        together: it needs all completions of a prompt at once.
        rate_all: instead of `rate`, for one that is quicker with many groups at once: the scores of
            the first group, then those of the next.
    """

    rate: Rate
    columns: tuple[str, ...] = ()
    together: bool = False
    rate_all: RateAll | None = None

    def scores(self, groups: Sequence[Group]) -> Iterator[Yielded]:
        """The scores of these groups, one after another."""
        if self.rate_all is not None:
            yield from self.rate_all(groups)
            return
        for group in groups:
            yield from self.rate(group)


class Refused(InputError):
    """A reward that cannot be used. Its pool adds what it is called."""

    def __init__(self, rule: str, remedy: str) -> None:
        super().__init__("", rule, remedy)


class Broken(Exception):
    """A reward that will never give the scores that were asked for."""


def at_once(rate_all: RateAll, together: bool = False) -> Scorer:
    """A scorer of many groups at once."""
    return Scorer(lambda group: rate_all([group]), together=together, rate_all=rate_all)


def each(
    score: Callable[[Group, int], float | None],
    columns: Sequence[str | None] = (),
) -> Scorer:
    """A scorer of one completion after another; what `score` raises is why there is no score."""

    def rate(group: Group) -> Iterator[Yielded]:
        for number in range(len(group.completions)):
            try:
                value: Yielded = score(group, number)
            except Exception as error:  # noqa: BLE001 - it may be code of the user
                value = Score(None, f"{type(error).__name__}: {error}")
            yield value

    return Scorer(rate, tuple(column for column in columns if column is not None))


def reference_of(group: Group, column: str | None) -> str:
    """The right answer of a row. Raises ValueError where the row has none."""
    value = group.reference if column is None else group.columns[column]
    text = "" if value is None else str(value).strip()
    if not text:
        raise ValueError("the row has no right answer")
    return text
