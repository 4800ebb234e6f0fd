"""Points of a search space: all of a grid, one at random, and whether a point is allowed."""

from __future__ import annotations

import ast
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
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


def different(line: Distribution) -> list[Any]:
    """The values of a line, each once; 1, 1.0 and true are different."""
    return list({repr(value): value for value in line.values}.values())


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
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
_CONDITIONS = (ast.Compare, ast.BoolOp)


@dataclass(frozen=True)
class Condition:
    """One line of `search.constraints`; `names` are the keys that it reads."""

    text: str
    names: frozenset[str]
    _code: CodeType

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether a trial meets the condition. A trial on a branch without one of its keys does;
        one that divides by zero does not.

        Raises:
            ConfigError: it compares or adds what cannot be compared or added.
        """
        if not self.names <= values.keys():
            return True
        try:
            known = {"__builtins__": {}, "number": _number, "values": values}
            return bool(eval(self._code, known))  # nosec B307 # `_checked` made it
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
    checked = ast.Expression(_checked(tree, text, names))
    code = compile(ast.fix_missing_locations(checked), "<constraint>", "eval")
    return Condition(text, frozenset(names), code)


def _checked(node: ast.expr, text: str, names: set[str]) -> ast.expr:
    """The same expression with keys read from `values` and operands of arithmetic passed through
    `number`, so that no text is multiplied; adds the keys to `names`.

    Raises:
        ConfigError: a part is not in the language of constraints.
    """

    def inner(each: ast.expr) -> ast.expr:
        return _checked(each, text, names)

    def number(each: ast.expr) -> ast.expr:
        return ast.Call(ast.Name("number", ast.Load()), [inner(each)], [])

    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            return node
        case ast.Name() | ast.Attribute():
            name = _dotted(node, text)
            names.add(name)
            return ast.Subscript(ast.Name("values", ast.Load()), ast.Constant(name), ast.Load())
        case ast.BinOp() if isinstance(node.op, _ARITHMETIC):
            return ast.BinOp(number(node.left), node.op, number(node.right))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            return ast.UnaryOp(node.op, number(node.operand))
        case ast.UnaryOp(op=ast.Not()):
            return ast.UnaryOp(node.op, inner(node.operand))
        case ast.BoolOp():  # true or false, where Python would give one of the operands
            value = ast.BoolOp(node.op, [inner(each) for each in node.values])
            return ast.UnaryOp(ast.Not(), ast.UnaryOp(ast.Not(), value))
        case ast.Compare() if all(isinstance(op, _COMPARISONS) for op in node.ops):
            return ast.Compare(inner(node.left), node.ops, [inner(e) for e in node.comparators])
    raise _error(
        text,
        f"has `{ast.unparse(node)}`, which is not part of the language",
        "write numbers, texts, keys, + - * / // %, comparisons, and, or, not",
    )


def _dotted(node: ast.expr, text: str) -> str:
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{_dotted(node.value, text)}.{node.attr}"
    raise _error(text, f"has `{ast.unparse(node)}`, which is not a key", "write a dotted key")


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
        shown = f"{key}={shown_value(value)}"
        raise ConfigError(shown, "is not a duration", "write one such as 90s, 3m, 2h or 1d")
    return float(seconds)


DEFAULT_TRIALS = 16
MAX_GRID = 10_000
Point = dict[str, Any]


def conditions(search: SearchConfig) -> list[Condition]:
    """The parsed constraints; ConfigError for one that is not in their language."""
    return [parse_condition(text) for text in search.constraints]


def unmet(search: SearchConfig, tried: str) -> ConfigError:
    """The error of constraints that none of the points meets that were `tried`."""
    return ConfigError(
        f"search.constraints: {shown_value(' and '.join(search.constraints))}",
        f"is met by none of {tried}",
        "widen search.space or drop a constraint",
    )


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
        return different(line)
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
