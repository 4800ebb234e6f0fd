"""Checks of the search section. They refuse and never rewrite; each raises ConfigError."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raytune_ft.config import reference
from raytune_ft.config.explain import shown_value, unknown_key
from raytune_ft.config.schema import Config
from raytune_ft.config.search import Distribution, SearchConfig
from raytune_ft.config.search_space import (
    METHOD,
    Branches,
    Condition,
    allowed,
    branches,
    conditions,
    contains,
    different,
    duration_s,
    grid,
    same,
    trial_count,
    uniform_point,
    unmet,
)
from raytune_ft.errors import ConfigError

# Keys that decide what a trial is measured on or where it runs: a search over them would compare
# trials that are not comparable.
NOT_SEARCHED = (
    "name",
    "storage",
    "model.path",
    "model.revision",
    "model.trust_remote_code",
    "data.train",
    "data.validation",
    "data.test",
    "data.max_length",
    "data.too_long",
    "data.separator",
    "data.max_bad_fraction",
    "data.curriculum.by",
    "data.curriculum.column",
    "train.kd.cache",
    "train.kd.cache_limit_gib",
    "train.dpo.reference",
    "train.rollout.engine",
    "train.rollout.vllm",
    "parallel",
    "checkpoint",
    "search",
    "promote",
    "tracking",
    "sampling",
    "rewards",
)
MIN_DRAWS, MAX_DRAWS = 100, 10_000

# Keys of a source of data.train that change how often it is seen, not what is measured.
SHARES = ("weight", "epochs")

Apply = Callable[[Config, Mapping[str, Any]], Config]


def check_search(search: SearchConfig) -> None:
    """Metrics are distinct, and `mode` is the direction of each. Raises ConfigError."""
    metrics, modes = search.metrics, search.modes
    if not metrics or len(set(metrics)) < len(metrics):
        raise ConfigError(
            f"search.metric={shown_value(metrics)}",
            "is empty or repeats a metric",
            "write one metric, or a list of different ones",
        )
    if ":" in metrics[0]:
        raise ConfigError(
            f"search.metric={shown_value(metrics)}",
            f"begins with {metrics[0]}, and trials are ranked by the whole validation set",
            "write eval_loss first",
        )
    written = [search.mode] if isinstance(search.mode, str) else search.mode
    if search.mode != "auto" and list(written) != modes:
        wrong = [m for m, now, best in zip(metrics, written, modes, strict=False) if now != best]
        raise ConfigError(
            f"search.mode={shown_value(search.mode)}",
            f"looks for the worst {wrong[0]}"
            if wrong
            else f"does not give each of {metrics} a direction",
            f"write search.mode: {shown_value(modes[0] if len(modes) == 1 else modes)}",
        )
    if len(metrics) > 1 and search.sampler == "cmaes":
        raise ConfigError(
            "search.sampler=cmaes", "supports one metric only", "write sampler: tpe, gp or random"
        )


def check_budget(config: Config) -> None:
    """The time can be read, and there are GPUs to count. Raises ConfigError."""
    budget = config.search.budget if config.search else None
    if budget is None:
        return
    if budget.wall_s is not None:
        duration_s(budget.wall_s)
    written = config.parallel.resources_per_worker
    none = isinstance(written, dict) and written.get("GPU") == 0
    if budget.gpu_hours is not None and none:
        raise ConfigError(
            f"search.budget.gpu_hours={budget.gpu_hours:g}",
            "counts GPUs, and parallel.resources_per_worker has none",
            "write search.budget.wall_s or examples, or give workers a GPU",
        )


def check_examples(search: SearchConfig, budget: int) -> None:
    """The search's budget and first rung against the `budget` examples of one trial, which is
    known once the data are read. Raises ConfigError.
    """
    whole = search.budget.examples if search.budget else None
    if whole is not None and whole < budget:
        raise ConfigError(
            f"search.budget.examples={whole}",
            f"is less than the {budget} examples of one trial",
            f"write at least {budget}, or a smaller train.max_examples",
        )
    scheduler = search.scheduler
    if scheduler is not None and scheduler.grace_examples > budget:
        raise ConfigError(
            f"search.scheduler.grace_examples={scheduler.grace_examples}",
            f"is more than the {budget} examples that a trial sees",
            f"write at most {max(1, budget // 3)}, or scheduler: null",
        )


def check_space(config: Config, apply: Apply) -> None:
    """Every key and value of the search space, each in the config of a trial that has it; then the
    sampler, the constraints and the first points. Raises ConfigError.

    `apply` is `load.apply_overrides`, an argument because load imports this module.
    """
    search = config.search
    assert search is not None
    alone = config.model_copy(update={"search": None})
    names = _method_names(config)
    for key in search.space:
        _check_searched(key, names)
    tree = branches(search.space)
    for key, line in search.space.items():
        for value in different(line):
            _check_value(alone, line, tree.with_needs(key, value), key, apply)
    _check_sampler(search, tree)
    _check_constraints(search, tree)
    _check_first(alone, search, tree, apply)


def _check_sampler(search: SearchConfig, tree: Branches) -> None:
    if search.sampler == "grid" and search.first:
        raise ConfigError(
            "search.first",
            "has no effect under search.sampler=grid, which tries every point",
            "delete search.first",
        )
    if search.warm_start and search.sampler not in ("tpe", "gp"):
        raise ConfigError(
            "search.warm_start",
            f"has no effect under search.sampler={search.sampler}, which learns nothing from it",
            "write sampler: tpe or gp, or delete search.warm_start",
        )
    if search.sampler != "cmaes":
        return
    for key, line in search.space.items():
        if line.kind == "choice" or tree.needs[key]:
            what = "a choice" if line.kind == "choice" else "not in every trial"
            raise ConfigError(
                f"search.space.{key}",
                f"is {what}, and search.sampler=cmaes supports only numbers",
                "write a range, or sampler: tpe",
            )
    if len(search.space) < 2:
        raise ConfigError(
            "search.sampler=cmaes", "needs two lines of search.space", "write sampler: tpe"
        )


def _check_constraints(search: SearchConfig, tree: Branches) -> None:
    """Each can be computed wherever it applies, and some point meets all of them."""
    constraints = conditions(search)
    for each in constraints:
        for name in sorted(each.names - search.space.keys()):
            raise ConfigError(
                f"search.constraints: {shown_value(each.text)}",
                f"names {shown_value(name)}, which is not a line of search.space",
                _nearest(name, search),
            )
    if not constraints:
        return
    if search.sampler == "grid":
        found, tried = bool(grid(search)), "all points of the grid"
    else:
        found, tried = _is_met(search, tree, constraints), f"{MAX_DRAWS:,} draws"
    if not found:
        raise unmet(search, tried)


def _nearest(name: str, search: SearchConfig) -> str:
    near = reference.closest(name, search.space)
    return f"did you mean {near}?" if near else f"write {reference.one_of(search.space)}"


def _is_met(search: SearchConfig, tree: Branches, constraints: Sequence[Condition]) -> bool:
    """Whether one of many draws meets all; at least `MIN_DRAWS` are made, since each draw also
    shows whether the constraints can be computed.
    """
    rng = random.Random(0)
    met = 0
    for tried in range(MAX_DRAWS):
        met += allowed(uniform_point(search.space, tree, rng, {}), constraints)
        if met and tried >= MIN_DRAWS:
            break
    return met > 0


def _check_first(alone: Config, search: SearchConfig, tree: Branches, apply: Apply) -> None:
    constraints = conditions(search)
    for number, point in enumerate(search.first):
        where = f"search.first[{number}]"
        if not point:
            raise ConfigError(where, "is empty", "write for example {train.lr: 1e-4}")
        needed: dict[str, Any] = {}
        for key, value in point.items():
            _check_point(where, point, key, search, tree)
            needed |= tree.with_needs(key, value)
        try:
            apply(alone, needed | point)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.value}", error.rule, error.remedy) from None
        for each in constraints:
            if not each.holds(point):
                rule = f"does not meet {shown_value(each.text)}"
                raise ConfigError(where, rule, "write a point that does")
    if len(search.first) > trial_count(search):
        raise ConfigError(
            f"search.trials={search.trials}",
            f"is less than the {len(search.first)} points of search.first",
            f"write at least {len(search.first)}",
        )


def _check_point(
    where: str, point: Mapping[str, Any], key: str, search: SearchConfig, tree: Branches
) -> None:
    line, value = search.space.get(key), point[key]
    if line is None:
        raise ConfigError(
            f"{where}: {shown_value(key)}", "is not a line of search.space", _nearest(key, search)
        )
    if not contains(line, value):
        raise ConfigError(
            f"{where}: {key}={shown_value(value)}",
            f"is not within {line.kind}: {shown_value(line.values)}",
            "write a value that the space has, or widen the space",
        )
    for other, values in tree.needs[key].items():
        if other in point and not any(same(point[other], each) for each in values):
            raise ConfigError(
                f"{where}: {key}",
                f"does not exist where {other}={shown_value(point[other])}",
                "delete one of the two",
            )


def is_share(key: str) -> bool:
    """Whether a dotted key is the weight or the epochs of one of several sources of train."""
    parts = key.split(".")
    return len(parts) == 4 and parts[:2] == ["data", "train"] and parts[3] in SHARES


def _method_names(config: Config) -> list[str]:
    """The methods that trials may have."""
    assert config.search is not None
    line = config.search.space.get(METHOD)
    written: list[Any] = line.values if line is not None else [config.method.name]
    known = [name for name in written if isinstance(name, str) and name in reference.methods()]
    return known or [config.method.name]


def _check_searched(key: str, names: list[str]) -> None:
    line = f"search.space.{key}"
    if reference.is_under(key, NOT_SEARCHED) and not is_share(key):
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
    alone: Config, line: Distribution, params: dict[str, Any], key: str, apply: Apply
) -> None:
    try:
        apply(alone, params)
    except ConfigError as error:
        remedy = error.remedy
        field = reference.field_at(key.split("."))
        whole = field is not None and "a whole number" in reference.words(field)
        if whole and line.kind in ("uniform", "log_uniform"):
            remedy = "write int_uniform: [low, high], or choice"
        raise ConfigError(f"search.space.{key}: {error.value}", error.rule, remedy) from None
