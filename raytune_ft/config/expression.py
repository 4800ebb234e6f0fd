"""Conditions over the lines of a search space: `train.batch_size * method.rank <= 512`.

A text is parsed by Python's `ast` and walked by this file, which knows numbers, texts, dotted
names, + - * / // %, comparisons, and, or, not. Nothing of it is ever executed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raytune_ft.config.explain import shown_value
from raytune_ft.errors import ConfigError

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
