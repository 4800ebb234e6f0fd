"""Points of a search space: all of a grid, one at random, and whether a point is allowed."""

from __future__ import annotations

import ast
import itertools
import math
import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.config import reference
from raytune_ft.config.explain import shown_value
from raytune_ft.config.search import Distribution, SearchConfig
from raytune_ft.errors import ConfigError

METHOD = "method.name"


@dataclass(frozen=True)
class Branches:
    """`order`: keys, each after the ones it depends on. `needs`: by key and by the key that it
    depends on, the values under which it exists.
    """

    order: tuple[str, ...]
    needs: Mapping[str, Mapping[str, tuple[Any, ...]]]

    def exists(self, key: str, values: Mapping[str, Any]) -> bool:
        """Whether a trial with these values, which hold all that `key` depends on, has `key`."""
        return all(
            other in values and any(same(values[other], each) for each in allowed)
            for other, allowed in self.needs[key].items()
        )

    def with_needs(self, key: str, value: Any) -> dict[str, Any]:
        """`key: value` with one value for everything that it depends on."""
        values = {key: value}
        for other, allowed in self.needs[key].items():
            values = {**self.with_needs(other, allowed[0]), **values}
        return values


def branches(space: Mapping[str, Distribution]) -> Branches:
    """Raises ConfigError for a `when` that names no choice of the space, or a cycle of them."""
    needs = {key: _needs(key, line, space) for key, line in space.items()}
    order: list[str] = []
    while len(order) < len(space):
        ready = [key for key in space if key not in order and needs[key].keys() <= set(order)]
        if not ready:
            circle = next(key for key in space if key not in order)
            raise ConfigError(
                f"search.space.{circle}.when",
                "depends on itself",
                "delete one `when` of the circle",
            )
        order += ready
    return Branches(tuple(order), needs)


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same type: a choice may hold 1, 1.0 and true."""
    return type(one) is type(other) and bool(one == other)


def contains(line: Distribution, value: Any) -> bool:
    """Whether a line could have drawn `value`."""
    if line.kind == "choice":
        return any(same(value, each) for each in line.values)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = line.values
    return bool(low <= value <= high and (line.kind != "int_uniform" or isinstance(value, int)))


def _needs(
    key: str, line: Distribution, space: Mapping[str, Distribution]
) -> dict[str, tuple[Any, ...]]:
    needs = {
        other: _allowed(key, other, value, space) for other, value in (line.when or {}).items()
    }
    if METHOD in space and key.startswith("method.") and key != METHOD and METHOD not in needs:
        names = space[METHOD].values
        owners = tuple(name for name in names if _has(name, key))
        if owners and len(owners) < len(names):
            needs[METHOD] = owners
    return needs


def _allowed(
    key: str, other: str, value: Any, space: Mapping[str, Distribution]
) -> tuple[Any, ...]:
    where = f"search.space.{key}.when"
    line = space.get(other)
    if line is None or line.kind != "choice" or other == key:
        choices = [name for name, each in space.items() if each.kind == "choice" and name != key]
        raise ConfigError(
            f"{where}: {shown_value(other)}",
            "is not another choice of search.space",
            f"write {reference.one_of(choices)}" if choices else "delete the `when`",
        )
    written = value if isinstance(value, list) and not contains(line, value) else [value]
    for each in written:
        if not contains(line, each):
            raise ConfigError(
                f"{where}: {other}={shown_value(each)}",
                "is none of its choices",
                f"write {reference.one_of(shown_value(item) for item in line.values)}",
            )
    if not written:
        raise ConfigError(f"{where}: {other}=[]", "is never true", "write a value or a list")
    return tuple(written)


def _has(name: Any, key: str) -> bool:
    known = isinstance(name, str) and name in reference.methods()
    return known and key in reference.method_keys(name)


MAX_CHARACTERS = 300
_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_CONDITIONS = (ast.Compare, ast.BoolOp)


@dataclass(frozen=True)
class Condition:
    """One line of `search.constraints`; `names` are the keys that it speaks of."""

    text: str
    names: frozenset[str]
    _tree: ast.expr

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether a trial meets it. One that lacks a name of it, on another branch, does; one that
        divides by zero does not.

        Raises:
            ConfigError: it compares or adds what cannot be compared or added.
        """
        if not self.names <= values.keys():
            return True
        try:
            return bool(_value(self._tree, values))
        except (ZeroDivisionError, OverflowError):
            return False
        except TypeError:
            at = ", ".join(f"{name}={shown_value(values[name])}" for name in sorted(self.names))
            raise _error(
                self.text, f"cannot be computed at {at}", "compare numbers with numbers"
            ) from None


def parse_condition(text: str) -> Condition:
    """Raises ConfigError for anything but a condition in the language of this file."""
    if len(text) > MAX_CHARACTERS:
        raise _error(text, f"has over {MAX_CHARACTERS} characters", "write several constraints")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _error(text, "is not a condition", "write for example a.b * c.d <= 512") from None
    if not isinstance(tree, _CONDITIONS) and not _is_not(tree):
        raise _error(text, "compares nothing", "write for example a.b * c.d <= 512")
    names: set[str] = set()
    _collect(tree, text, names)
    return Condition(text, frozenset(names), tree)


def _collect(node: ast.expr, text: str, names: set[str]) -> None:
    """The names below `node`; refuses what `_value` does not know."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            return
        case ast.Name() | ast.Attribute():
            names.add(_dotted(node, text))
            return
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            inner = [node.left, node.right]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not()):
            inner = [node.operand]
        case ast.BoolOp():
            inner = node.values
        case ast.Compare(ops=ops) if all(type(op) in _COMPARISONS for op in ops):
            inner = [node.left, *node.comparators]
        case _:
            raise _error(
                text,
                f"has `{ast.unparse(node)}`, which is not part of the language",
                "write numbers, texts, keys, + - * / // %, comparisons, and, or, not",
            )
    for each in inner:
        _collect(each, text, names)


def _dotted(node: ast.expr, text: str) -> str:
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{_dotted(node.value, text)}.{node.attr}"
    raise _error(text, f"has `{ast.unparse(node)}`, which is no key", "write a dotted key")


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name() | ast.Attribute():
            return values[ast.unparse(node)]
        case ast.BinOp():
            return _ARITHMETIC[type(node.op)](
                _number(_value(node.left, values)), _number(_value(node.right, values))
            )
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, values)
        case ast.UnaryOp():
            operand = _number(_value(node.operand, values))
            return -operand if isinstance(node.op, ast.USub) else operand
        case ast.BoolOp(op=ast.And()):
            return all(_value(each, values) for each in node.values)
        case ast.BoolOp():
            return any(_value(each, values) for each in node.values)
        case ast.Compare():
            sides = [_value(each, values) for each in (node.left, *node.comparators)]
            pairs = zip(node.ops, sides, sides[1:], strict=False)
            return all(_COMPARISONS[type(op)](one, other) for op, one, other in pairs)
    raise AssertionError(f"{node} was not refused")


def _number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise TypeError


def _is_not(tree: ast.expr) -> bool:
    return isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not)


def _error(text: str, rule: str, remedy: str) -> ConfigError:
    return ConfigError(f"search.constraints: {shown_value(text)}", rule, remedy)


UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")


def duration_s(value: float | str, key: str = "search.budget.wall_s") -> float:
    """Seconds of a number, or of a text such as `90s`, `1.5h` or `2d`; ConfigError otherwise."""
    found = _WRITTEN.fullmatch(value) if isinstance(value, str) else None
    seconds = float(found[1]) * UNITS_S[found[2]] if found else value
    if isinstance(seconds, str) or not 0 < seconds < math.inf:
        raise ConfigError(
            f"{key}={shown_value(value)}", "is not a time span", "write seconds, or 90m, 2h, 1d"
        )
    return float(seconds)


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
    """A random point; keys in `known` have its values."""
    point: Point = {}
    for key in tree.order:
        if tree.exists(key, point):
            point[key] = known[key] if key in known else _uniform(space[key], rng)
    return point


def grid(search: SearchConfig) -> list[Point]:
    """Every allowed combination, once, in the order of the file.

    Raises ConfigError for a line with infinitely many values, or for over `MAX_GRID` points.
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
        f"is {line.kind}, which has infinitely many values, and search.sampler=grid tries all",
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
