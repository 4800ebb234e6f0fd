"""Seeded generator of the declarative text on which the embedded model is pretrained.

The text contains statements only, no instructions and no answers to questions. So the base learns
the facts, the words and how to look something up in a passage, and fine-tuning teaches the format.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Iterator

from scripts.tiny.world import (
    COLOURED,
    COLOURS,
    COUNTABLE,
    KIND_OF,
    MAX_ADDEND,
    MAX_SORTED,
    MEMBERS,
    MOODS,
    NAMES,
    NOUNS,
    OPPOSITES,
    PLACES,
    THINGS,
    VERBS,
    WEATHER,
    plural,
    with_article,
)

Passage = Callable[[random.Random], str]


def documents(seed: int) -> Iterator[str]:
    """An endless stream of documents; the same seed gives the same stream."""
    rng = random.Random(seed)
    passages, weights = zip(*PASSAGES, strict=True)
    while True:
        chosen = rng.choices(passages, weights, k=rng.randint(2, 6))
        text = " ".join(passage(rng) for passage in chosen)
        # A quarter is wrapped at a random width, so that every word also occurs after a line break.
        yield textwrap.fill(text, rng.randint(16, 60)) if rng.random() < 0.25 else text


def _listed(words: list[str], rng: random.Random) -> str:
    """Words as a list, sometimes with a final "and"."""
    if rng.random() < 0.5:
        return ", ".join(words)
    return ", ".join(words[:-1]) + " and " + words[-1]


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _stated(subject: str, answer: str, rng: random.Random) -> str:
    """A statement that the subject is the answer, sometimes with a clause between the two.

    If the distance were always the same, the model could recall a fact in that one position only,
    and fine-tuning for a few seconds would not change that.
    """
    if rng.random() < 0.4:
        return f"{_capital(subject)} is {answer}."
    name, friend = rng.sample(NAMES, 2)
    return rng.choice(
        [
            f"{_capital(subject)}, says {name}, is {answer}.",
            f"{name} thinks of {subject}. It is {answer}.",
            f"{name} and {friend} look for {subject}. They find {answer}.",
            f"{name} writes about {subject} in the {rng.choice(PLACES)}: {answer}.",
            f"{_capital(subject)}, as {name} knows on a {rng.choice(WEATHER)} day, is {answer}.",
        ]
    )


def _opposite(rng: random.Random) -> str:
    word, other = rng.choice(OPPOSITES)
    if rng.random() < 0.5:
        word, other = other, word
    if rng.random() < 0.7:
        return _stated(f"the opposite of {word}", other, rng)
    return rng.choice(
        [f"{_capital(word)} and {other} are opposites.", f"What is not {word} is {other}."]
    )


def _plural(rng: random.Random) -> str:
    noun = rng.choice(NOUNS)
    if rng.random() < 0.7:
        return _stated(f"the plural of {noun}", plural(noun), rng)
    return rng.choice(
        [
            f"One {noun}, {rng.randint(2, 9)} {plural(noun)}.",
            f"{rng.choice(NAMES)} has one {noun}. {rng.choice(NAMES)} has many {plural(noun)}.",
        ]
    )


def _colour(rng: random.Random) -> str:
    thing, colour = rng.choice(list(COLOURED.items()))
    if rng.random() < 0.6:
        return _stated(f"the colour of the {thing}", colour, rng)
    return rng.choice(
        [f"The {thing} is {colour}.", f"{rng.choice(NAMES)} paints the {thing} {colour}."]
    )


def _kind(rng: random.Random) -> str:
    thing, kind = rng.choice(list(KIND_OF.items()))
    other = rng.choice(MEMBERS[kind])
    forms = [
        f"{_capital(with_article(thing))} is {with_article(kind)}.",
        f"{_capital(with_article(thing))} is a kind of {kind}.",
        _stated(f"the kind of {with_article(thing)}", kind, rng),
    ]
    if other != thing:
        both = f"{_capital(with_article(thing))} and {with_article(other)}"
        forms.append(f"{both} are both {plural(kind)}.")
    return rng.choice(forms)


def _sum(rng: random.Random) -> str:
    a, b = rng.randint(0, MAX_ADDEND), rng.randint(0, MAX_ADDEND)
    if rng.random() < 0.7:
        return _stated(rng.choice([f"{a} plus {b}", f"the sum of {a} and {b}"]), str(a + b), rng)
    return rng.choice([f"{a} and {b} make {a + b}.", f"{a + b} minus {a} is {b}."])


def _sort(rng: random.Random) -> str:
    numbers = rng.sample(range(1, MAX_SORTED + 1), 3)
    mixed = _listed([str(number) for number in numbers], rng)
    ordered = _listed([str(number) for number in sorted(numbers)], rng)
    if rng.random() < 0.5:
        return _stated(f"the order of {mixed}", ordered, rng)
    return rng.choice(
        [
            f"In order, {mixed} are {ordered}.",
            f"{rng.choice(NAMES)} sorts {mixed} and gets {ordered}.",
            f"{max(numbers)} is more than {min(numbers)}.",
            f"{min(numbers)} is less than {max(numbers)}.",
        ]
    )


def _count(rng: random.Random) -> str:
    sorts = rng.sample(COUNTABLE, 2)
    row = [rng.choice(sorts) for _ in range(rng.randint(3, 5))]
    noun = rng.choice(row)
    number, bare = row.count(noun), ", ".join(row)
    if rng.random() < 0.6:
        return _stated(f"the number of {plural(noun)} in {bare}", str(number), rng)
    counted = f"{number} {noun if number == 1 else plural(noun)}"
    return f"In the row {bare} there {'is' if number == 1 else 'are'} {counted}."


def _ladder(rng: random.Random) -> str:
    first = rng.randint(0, MAX_SORTED - 4)
    numbers = [str(number) for number in range(first, first + rng.randint(3, 5))]
    return f"{rng.choice(NAMES)} counts {', '.join(numbers)}."


def _owners(rng: random.Random) -> str:
    """Who has what, stated twice: practice in looking something up in a passage."""
    number = rng.randint(2, 4)
    owned = list(zip(rng.sample(NAMES, number), rng.sample(THINGS, number), strict=True))
    told = [f"{name} has the {thing}." for name, thing in owned]
    for name, thing in rng.sample(owned, number):
        told.append(
            rng.choice(
                [
                    f"So the {thing} belongs to {name}.",
                    f"What {name} has is the {thing}.",
                    _stated(f"the owner of the {thing}", name, rng),
                ]
            )
        )
    return " ".join(told)


def _whereabouts(rng: random.Random) -> str:
    number = rng.randint(2, 4)
    where = list(zip(rng.sample(NAMES, number), rng.sample(PLACES, number), strict=True))
    told = [f"{name} is in the {place}." for name, place in where]
    for name, place in rng.sample(where, number):
        told.append(
            rng.choice(
                [
                    f"The one in the {place} is {name}.",
                    f"We know where {name} is: in the {place}.",
                ]
            )
        )
    return " ".join(told)


def _story(rng: random.Random) -> str:
    name, friend = rng.sample(NAMES, 2)
    place, animal, thing = rng.choice(PLACES), rng.choice(MEMBERS["animal"]), rng.choice(THINGS)
    colour, mood = rng.choice(COLOURS), rng.choice(MOODS)
    middle = [
        f"{name} has {with_article(colour)} {thing}.",
        f"{name} {rng.choice(VERBS)} {with_article(animal)}. The {animal} is {mood}.",
        f"{friend} gives {name} {with_article(thing)}. The {thing} is {colour}.",
        f"{friend} writes how many {plural(thing)} there are.",
        f"{friend} asks which {thing} is {colour}.",
    ]
    opening = [
        f"It is a {rng.choice(WEATHER)} day. {name} goes to the {place}.",
        f"{name} and {friend} are in the {place}.",
    ]
    ending = [f"{name} is {mood}.", f"Then {name} goes home.", f"{name} thanks {friend}."]
    return " ".join([rng.choice(opening), *rng.sample(middle, 2), rng.choice(ending)])


# Passages that must be worked out need more practice than facts that must be remembered.
PASSAGES: list[tuple[Passage, float]] = [
    (_opposite, 2.0),
    (_plural, 2.0),
    (_colour, 1.3),
    (_kind, 1.3),
    (_sum, 2.5),
    (_sort, 2.5),
    (_count, 2.5),
    (_ladder, 0.1),
    (_owners, 0.4),
    (_whereabouts, 0.3),
    (_story, 0.4),
]
