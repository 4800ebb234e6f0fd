"""Write the quickstart's instruction data: seven kinds of short question about the small world.

A test row requires the skill of its kind, not a remembered string: no training row, in any
phrasing, asks about the words, sums and number sets that the test asks about.

    python -m scripts.tiny.instructions
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

from scripts.tiny.world import (
    COLOURED,
    COUNTABLE,
    KIND_OF,
    MAX_ADDEND,
    MAX_SORTED,
    NOUNS,
    OPPOSITES,
    plural,
    with_article,
)

T = TypeVar("T")
Row = tuple[str, str]
Split = tuple[list[Row], list[Row]]
TEST_SHARE = 0.25


def main() -> None:
    args = _arguments()
    rng = random.Random(args.seed)
    splits = [kind(rng) for kind in KINDS]
    taken: set[str] = set()
    for name, side, rows in (("test", 1, args.test_rows), ("train", 0, args.train_rows)):
        mixed = _mix([split[side] for split in splits], rows, taken, rng)
        _write(args.out / f"{name}.jsonl", mixed)
        print(f"{name}: {len(mixed)} rows")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=int, default=1536)
    parser.add_argument("--test-rows", type=int, default=304)
    parser.add_argument("--out", type=Path, default=Path("jobs/data/tiny_instructions"))
    return parser.parse_args()


def _mix(kinds: list[list[Row]], rows: int, taken: set[str], rng: random.Random) -> list[Row]:
    """Rows of the kinds in turn; a kind without rows left is skipped."""
    for kind in kinds:
        rng.shuffle(kind)
    mixed = list(islice(_fresh(_in_turn(kinds), taken), rows))
    rng.shuffle(mixed)
    return mixed


def _in_turn(kinds: list[list[Row]]) -> Iterator[Row]:
    left = [iter(kind) for kind in kinds]
    while left:
        for rows in list(left):
            try:
                yield next(rows)
            except StopIteration:
                left.remove(rows)


def _fresh(rows: Iterable[Row], taken: set[str]) -> Iterator[Row]:
    """Drop rows whose instruction was already written, to this file or to the other one."""
    for instruction, response in rows:
        if instruction not in taken:
            taken.add(instruction)
            yield instruction, response


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"instruction": asked, "response": given}) for asked, given in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _held_out(items: Iterable[T], rng: random.Random) -> tuple[list[T], list[T]]:
    """Items for training and items for the test."""
    shuffled = list(items)
    rng.shuffle(shuffled)
    cut = round(len(shuffled) * TEST_SHARE)
    return shuffled[cut:], shuffled[:cut]


def _phrased(split: tuple[list[T], list[T]], ask: Callable[[T], list[Row]]) -> Split:
    """Every item, of training and of test, in every phrasing of its kind."""
    train, test = split
    return [row for item in train for row in ask(item)], [row for item in test for row in ask(item)]


def _opposites(rng: random.Random) -> Split:
    def ask(pair: tuple[str, str]) -> list[Row]:
        return [
            row
            for word, other in (pair, pair[::-1])
            for row in (
                (f"What is the opposite of {word}?", other),
                (f"Name the opposite of {word}.", other),
            )
        ]

    return _phrased(_held_out(OPPOSITES, rng), ask)


def _plurals(rng: random.Random) -> Split:
    def ask(noun: str) -> list[Row]:
        return [
            (f"Write the plural of {noun}.", plural(noun)),
            (f"What is the plural of {noun}?", plural(noun)),
        ]

    return _phrased(_held_out(NOUNS, rng), ask)


def _colours(rng: random.Random) -> Split:
    def ask(item: tuple[str, str]) -> list[Row]:
        thing, colour = item
        return [
            (f"What colour is the {thing}?", colour),
            (f"Name the colour of the {thing}.", colour),
        ]

    return _phrased(_held_out(COLOURED.items(), rng), ask)


def _members(rng: random.Random) -> Split:
    def ask(item: tuple[str, str]) -> list[Row]:
        thing, kind = item
        return [
            (f"What kind of thing is {with_article(thing)}?", kind),
            (f"Say what {with_article(thing)} is.", kind),
        ]

    return _phrased(_held_out(KIND_OF.items(), rng), ask)


def _sums(rng: random.Random) -> Split:
    def ask(pair: tuple[int, int]) -> list[Row]:
        return [
            row
            for a, b in {pair, pair[::-1]}
            for row in (
                (f"What is {a} plus {b}?", str(a + b)),
                (f"Add {a} and {b}.", str(a + b)),
            )
        ]

    pairs = [(a, b) for a in range(MAX_ADDEND + 1) for b in range(a, MAX_ADDEND + 1)]
    return _phrased(_held_out(pairs, rng), ask)


def _sorting(rng: random.Random) -> Split:
    def ask(numbers: frozenset[int]) -> list[Row]:
        mixed = rng.sample(sorted(numbers), len(numbers))
        listed = ", ".join(str(number) for number in mixed)
        return [(f"Sort: {listed}.", ", ".join(str(number) for number in sorted(numbers)))]

    drawn = (frozenset(rng.sample(range(1, MAX_SORTED + 1), 3)) for _ in range(800))
    return _phrased(_held_out(dict.fromkeys(drawn), rng), ask)


def _counting(rng: random.Random) -> Split:
    def ask(row: tuple[str, ...]) -> list[Row]:
        noun = rng.choice(row)
        return [(f"Count the {plural(noun)}: {', '.join(row)}.", str(row.count(noun)))]

    def draw() -> tuple[str, ...]:
        sorts = rng.sample(COUNTABLE, 2)
        return tuple(rng.choice(sorts) for _ in range(rng.randint(3, 5)))

    return _phrased(_held_out(dict.fromkeys(draw() for _ in range(800)), rng), ask)


KINDS: list[Callable[[random.Random], Split]] = [
    _opposites,
    _plurals,
    _colours,
    _members,
    _sums,
    _sorting,
    _counting,
]

if __name__ == "__main__":
    main()
