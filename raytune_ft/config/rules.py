"""Checks over more than one key. They refuse and never rewrite; each raises ConfigError."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raytune_ft.config import paths, reference
from raytune_ft.config.explain import shown_value, unknown_key
from raytune_ft.config.schema import Config, Distribution, LoraMethod, SearchConfig
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
MAX_SEED = 2**32 - 1

Apply = Callable[[Config, Mapping[str, Any]], Config]


def check(config: Config) -> None:
    """Every rule that needs the config alone."""
    paths.check_storage(config.storage)
    _check_layout(config)
    _check_method(config)
    if config.seed > MAX_SEED:
        raise ConfigError(f"seed={config.seed}", f"is above {MAX_SEED}", "write a smaller one")
    if config.search is not None:
        _check_search(config.search)
        if config.train.max_examples is not None and config.train.epochs is None:
            check_grace(config.search, config.train.max_examples)


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


def _check_layout(config: Config) -> None:
    parallel = config.parallel
    if parallel.min_workers > parallel.max_workers:
        raise ConfigError(
            f"parallel.workers={parallel.workers}",
            "is not [min, max] with min <= max",
            f"write [{parallel.max_workers}, {parallel.min_workers}]",
        )
    if config.train.batch_size < parallel.max_workers:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size}",
            f"is smaller than parallel.workers={parallel.workers}",
            f"write at least {parallel.max_workers}",
        )
    if parallel.strategy == "single" and parallel.max_workers > 1:
        raise ConfigError(
            "parallel.strategy=single",
            f"is one process, and parallel.workers={parallel.workers}",
            "write auto, ddp, fsdp or deepspeed, or parallel.workers: 1",
        )
    _check_sharding(config)
    for name, amount in parallel.resources_per_worker.items():
        key = f"parallel.resources_per_worker.{name}"
        if amount < 0:
            raise ConfigError(f"{key}={amount:g}", "is below 0", "write 0 or more")
    if parallel.resources_per_worker.get("CPU", 0) <= 0:
        raise ConfigError(
            f"parallel.resources_per_worker={shown_value(parallel.resources_per_worker)}",
            "gives a worker no CPU",
            "write for example {CPU: 1, GPU: 0}",
        )


def _check_sharding(config: Config) -> None:
    """Keys that only some strategies can follow."""
    parallel = config.parallel
    strategy = parallel.strategy
    if parallel.replicas > 1 and (parallel.elastic or parallel.max_workers % parallel.replicas):
        raise ConfigError(
            f"parallel.replicas={parallel.replicas}",
            f"does not divide parallel.workers={parallel.workers}"
            if not parallel.elastic
            else f"needs a fixed number of workers, not parallel.workers={parallel.workers}",
            "write a divisor of the number of workers, or 1",
        )
    if parallel.replicas > 1 and strategy not in ("auto", "fsdp"):
        raise ConfigError(
            f"parallel.replicas={parallel.replicas}",
            f"is for fsdp, and parallel.strategy={strategy}",
            "write parallel.strategy: fsdp, or parallel.replicas: 1",
        )
    if parallel.replicas > 1 and parallel.offload == "optimizer":
        raise ConfigError(
            f"parallel.replicas={parallel.replicas}",
            "is for fsdp, and parallel.offload=optimizer for deepspeed",
            "write parallel.offload: all, or parallel.replicas: 1",
        )
    if parallel.deepspeed is not None and strategy != "deepspeed":
        raise ConfigError(
            f"parallel.deepspeed={shown_value(parallel.deepspeed)}",
            f"is for deepspeed, and parallel.strategy={strategy}",
            "write parallel.strategy: deepspeed, or leave the key out",
        )
    able = {
        "none": ("auto", "single", "ddp", "fsdp", "deepspeed"),
        "optimizer": ("auto", "deepspeed"),
        "all": ("auto", "fsdp", "deepspeed"),
    }[parallel.offload]
    if strategy not in able:
        raise ConfigError(
            f"parallel.offload={parallel.offload}",
            f"is nothing that {strategy} can do",
            f"write parallel.strategy: {' or '.join(able[1:])}, or parallel.offload: none",
        )
    if strategy == "deepspeed" and parallel.offload == "all" and parallel.zero_stage < 3:
        raise ConfigError(
            "parallel.offload=all",
            f"keeps weights in host memory, which parallel.zero_stage={parallel.zero_stage} "
            "does not shard",
            "write parallel.zero_stage: 3, or parallel.offload: optimizer",
        )
    chosen = strategy == "auto" and parallel.offload == "optimizer"  # which nothing else can do
    if (strategy == "deepspeed" or chosen) and config.train.precision == "float64":
        raise ConfigError(
            "train.precision=float64",
            "is nothing that deepspeed can keep",
            "write float32 or bfloat16, or parallel.offload: none"
            if chosen
            else "write float32 or bfloat16, or another parallel.strategy",
        )


def _check_method(config: Config) -> None:
    method = config.method
    if isinstance(method, LoraMethod) and method.targets == []:
        raise ConfigError("method.targets=[]", "adapts nothing", "write all-linear or some names")


def _check_search(search: SearchConfig) -> None:
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
