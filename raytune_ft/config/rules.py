"""Checks over more than one key. They refuse and never rewrite; each raises ConfigError."""

from __future__ import annotations

from raytune_ft.config import metrics, objectives, paths
from raytune_ft.config.explain import shown_value
from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.schema import Config
from raytune_ft.config.search_rules import check_budget, check_examples, check_search
from raytune_ft.config.sizes import parse_size
from raytune_ft.errors import ConfigError

MAX_SEED = 2**32 - 1


def check(config: Config) -> None:
    """Every rule that needs the config alone."""
    paths.check_storage(config.storage)
    _check_layout(config)
    _check_method(config)
    metrics.check(config.promote)
    objectives.check(config)
    parse_size(config.promote.max_shard_size, "promote.max_shard_size")
    _check_splits(config)
    if config.seed > MAX_SEED:
        raise ConfigError(f"seed={config.seed}", f"is above {MAX_SEED}", "write a smaller one")
    if config.search is not None:
        check_search(config.search)
        check_budget(config)
        if config.train.max_examples is not None and config.train.epochs is None:
            check_examples(config.search, config.train.max_examples)


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


def _check_splits(config: Config) -> None:
    """What is chosen on is not what is measured in the end."""
    data = config.data
    if data.test is None or config.promote.max_overlap == 1:
        return
    for name, other in (("validation", data.validation), ("train", data.train)):
        if other == data.test:
            raise ConfigError(
                f"data.test={shown_value(data.test.path)}",
                f"is data.{name} too, and selecting on the test set is refused",
                "write another source, or none",
            )
