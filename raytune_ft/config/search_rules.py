"""Checks of the search section. They refuse and never rewrite; each raises ConfigError."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raytune_ft.config import reference
from raytune_ft.config.explain import unknown_key
from raytune_ft.config.schema import Config
from raytune_ft.config.search import Distribution, SearchConfig
from raytune_ft.errors import ConfigError

# Keys that decide what a trial is measured on or where it runs: a search over them would compare
# trials that are not comparable.
NOT_SEARCHED = (
    "name",
    "storage",
    "model.path",
    "data.train",
    "data.validation",
    "data.test",
    "data.max_length",
    "data.too_long",
    "data.separator",
    "data.max_bad_fraction",
    "parallel",
    "checkpoint",
    "search",
    "promote",
)

Apply = Callable[[Config, Mapping[str, Any]], Config]


def check_search(search: SearchConfig) -> None:
    best = "min" if search.metric == "eval_loss" else "max"
    if search.mode != best:
        raise ConfigError(
            f"search.mode={search.mode}",
            f"looks for the worst {search.metric}",
            f"write search.mode: {best}",
        )


def check_grace(search: SearchConfig, budget: int) -> None:
    """A grace period within the examples that a trial sees, which epochs alone do not tell."""
    scheduler = search.scheduler
    if scheduler is not None and scheduler.grace_examples > budget:
        raise ConfigError(
            f"search.scheduler.grace_examples={scheduler.grace_examples}",
            f"is more than the {budget} examples that a trial sees",
            f"write at most {max(1, budget // scheduler.reduction_factor)}, or scheduler: null",
        )


def check_space(config: Config, apply: Apply) -> None:
    """Every key and value of the search space, by putting it where a trial would have it.

    `apply` is `load.apply_overrides`, handed in because load calls this module.
    """
    assert config.search is not None
    alone = config.model_copy(update={"search": None})
    names = _method_names(config)
    for key, line in config.search.space.items():
        _check_searched(key, names)
        for value in dict.fromkeys(map(_Same, line.values)):
            _check_value(alone, key, line, value.value, names, apply)


def _method_names(config: Config) -> list[str]:
    """The methods that trials may have."""
    assert config.search is not None
    line = config.search.space.get("method.name")
    written: list[Any] = line.values if line is not None else [config.method.name]
    known = [name for name in written if isinstance(name, str) and name in reference.methods()]
    return known or [config.method.name]


def _check_searched(key: str, names: list[str]) -> None:
    line = f"search.space.{key}"
    for prefix in NOT_SEARCHED:
        if key == prefix or key.startswith(prefix + "."):
            raise ConfigError(
                line,
                "cannot be searched over: trials would not be comparable",
                f"delete the line and set {key} once",
            )
    parts = tuple(key.split("."))
    field = reference.field_at(parts)
    if field is None or (reference.sections_of(field.annotation) and not field.description):
        error = unknown_key(parts, names[0] if len(names) == 1 else None)
        raise ConfigError(line, "names no key of the config", error.remedy)
    if parts[0] == "method" and not any(key in reference.method_keys(name) for name in names):
        raise ConfigError(
            line,
            f"is not a key of method {' or '.join(names)}",
            "delete the line or add a method that has it to search.space.method.name",
        )


def _check_value(
    alone: Config, key: str, line: Distribution, value: Any, names: list[str], apply: Apply
) -> None:
    params = {key: value}
    owners = [name for name in names if key in reference.method_keys(name)]
    if owners and key != "method.name":
        params["method.name"] = owners[0]
    try:
        apply(alone, params)
    except ConfigError as error:
        remedy = error.remedy
        field = reference.field_at(key.split("."))
        whole = field is not None and "a whole number" in reference.words(field)
        if whole and line.kind in ("uniform", "log_uniform"):
            remedy = "write int_uniform: [low, high], or choice"
        raise ConfigError(f"search.space.{key}: {error.value}", error.rule, remedy) from None


class _Same:
    """A value of a choice, hashable whatever it is, told apart by how it is written."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))
