"""Which lines of a search space exist together: a rank only where the method is LoRA.

A line depends on others by its `when`, and a key that only some of the searched methods have
depends on `method.name` by itself. Pure; imports no optuna.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytune_ft.config import reference
from raytune_ft.config.explain import shown_value
from raytune_ft.config.search import Distribution
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
    """Raises ConfigError for a `when` that names no choice of the space, or itself in a circle."""
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
            "is no other choice of search.space",
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
