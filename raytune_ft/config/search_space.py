"""Points of a search space: all of a grid, one at random, and whether a point is allowed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raytune_ft.config.branches import Branches, branches
from raytune_ft.config.expression import Condition, parse_condition
from raytune_ft.config.search import Distribution, SearchConfig
from raytune_ft.errors import ConfigError

DEFAULT_TRIALS = 16
MAX_GRID = 10_000
Point = dict[str, Any]


def conditions(search: SearchConfig) -> list[Condition]:
    """The parsed constraints; ConfigError for one that is not in their language."""
    return [parse_condition(text) for text in search.constraints]


def allowed(point: Mapping[str, Any], constraints: Sequence[Condition]) -> bool:
    """Whether a point meets every constraint that it has the keys for."""
    return all(each.holds(point) for each in constraints)


def uniform_point(
    space: Mapping[str, Distribution], tree: Branches, rng: random.Random, known: Mapping[str, Any]
) -> Point:
    """A point at random, with the values of `known` where it has their keys."""
    point: Point = {}
    for key in tree.order:
        if tree.exists(key, point):
            point[key] = known[key] if key in known else _uniform(space[key], rng)
    return point


def grid(search: SearchConfig) -> list[Point]:
    """Every allowed combination, once, in the order of the file.

    Raises ConfigError for a line that has no end of values, and for more than `MAX_GRID` points.
    """
    steps = {key: _steps(key, line) for key, line in search.space.items()}
    tree, constraints = branches(search.space), conditions(search)
    points = list(itertools.islice(_walk(tree, steps, {}, 0), MAX_GRID + 1))
    if len(points) > MAX_GRID:
        raise ConfigError(
            "search.sampler=grid",
            f"has over {MAX_GRID} combinations",
            "write fewer choices, or sampler: tpe",
        )
    return [point for point in points if allowed(point, constraints)]


def trial_count(search: SearchConfig) -> int:
    """The trials of a sweep, counted with those that fail."""
    if search.sampler == "grid":
        size = len(grid(search))
        return size if search.trials == "auto" else min(size, search.trials)
    return DEFAULT_TRIALS if search.trials == "auto" else search.trials


def _walk(
    tree: Branches, steps: Mapping[str, Sequence[Any]], point: Point, depth: int
) -> Iterator[Point]:
    if depth == len(tree.order):
        yield point
        return
    key = tree.order[depth]
    if not tree.exists(key, point):
        yield from _walk(tree, steps, point, depth + 1)
        return
    for value in steps[key]:
        yield from _walk(tree, steps, {**point, key: value}, depth + 1)


def _steps(key: str, line: Distribution) -> Sequence[Any]:
    if line.kind == "choice":
        return list({repr(value): value for value in line.values}.values())
    if line.kind == "int_uniform":
        return range(line.values[0], line.values[1] + 1)
    raise ConfigError(
        f"search.space.{key}",
        f"is {line.kind}, which has no end of values, and search.sampler=grid tries every one",
        "write choice: [...], or sampler: tpe",
    )


def _uniform(line: Distribution, rng: random.Random) -> Any:
    values = line.values
    match line.kind:
        case "choice":
            return rng.choice(values)
        case "int_uniform":
            return rng.randint(*values)
        case "log_uniform":
            low, high = values
            return min(high, max(low, math.exp(rng.uniform(math.log(low), math.log(high)))))
    return rng.uniform(*values)
