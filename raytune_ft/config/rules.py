"""Checks over more than one key. They refuse and never rewrite; each raises ConfigError."""

from __future__ import annotations

from collections import Counter

from raytune_ft.config import metrics, objective_rules, paths
from raytune_ft.config.data import DataConfig, MixedSource, NamedSource, SourceConfig, listed
from raytune_ft.config.explain import shown_value
from raytune_ft.config.methods import (
    FreezeMethod,
    LoraMethod,
    QloraMethod,
    check_activations,
    check_head,
    check_promotion,
)
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.schema import Config
from raytune_ft.config.search_rules import check_budget, check_examples, check_search
from raytune_ft.config.section import parse_size
from raytune_ft.errors import ConfigError

SPLITS = ("train", "validation", "test")


def check_data(data: DataConfig) -> None:
    """Checks sources, mixture and curriculum. Raises ConfigError."""
    for split in SPLITS:
        _check_names(split, getattr(data, split))
    _check_shares(data)
    curriculum = data.curriculum
    if curriculum is not None and (curriculum.by == "column") != (curriculum.column is not None):
        raise ConfigError(
            f"data.curriculum.column={shown_value(curriculum.column)}",
            f"does not go with data.curriculum.by={curriculum.by}",
            "write by: column and the column's name, or neither",
        )


def check_apart(data: DataConfig) -> None:
    """The test set is neither trained nor selected on. Raises ConfigError."""
    measured = [_content(source) for source in listed(data.test)]
    for split in ("validation", "train"):
        for source in listed(getattr(data, split)):
            if _content(source) in measured:
                raise ConfigError(
                    f"data.test={shown_value(source.path)}",
                    f"is data.{split} too, and selecting on the test set is refused",
                    "write another source, or none",
                )


def _content(source: SourceConfig) -> dict[str, object]:
    return source.model_dump(include=set(SourceConfig.model_fields))


def _check_names(split: str, written: object) -> None:
    if not isinstance(written, list):
        return
    if not written:
        raise ConfigError(f"data.{split}=[]", "names no source", "write at least one")
    named = [source for source in written if isinstance(source, NamedSource)]
    name, count = Counter(source.called for source in named).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"data.{split}: {name}",
            f"is the name of {count} sources",
            f"give each another name, for example name: {name}-2",
        )


def _check_shares(data: DataConfig) -> None:
    sources = data.train if isinstance(data.train, list) else []
    weights = [source.weight for source in sources]
    epochs = [source.epochs for source in sources]
    mixture = data.mixture
    if mixture is not None and len(sources) < 2:
        raise ConfigError(
            f"data.mixture={shown_value(mixture.model_dump())}",
            "needs several sources, and data.train has one",
            "delete data.mixture, or write a list of sources",
        )
    has_weights, has_epochs = (
        any(w is not None for w in weights),
        any(e is not None for e in epochs),
    )
    if has_weights and has_epochs:
        _refuse_both(sources)
    if has_weights and None in weights:
        name = sources[weights.index(None)].called
        raise ConfigError(
            f"data.train.{name}",
            "has no weight, and other sources have one",
            "write one for every source, 0 for one that is measured and not trained on",
        )
    for key, shares in (("weight", weights), ("epochs", epochs)):
        if shares and all(share == 0 for share in shares):
            raise ConfigError(
                f"data.train: {key}=0 of every source",
                "leaves nothing to train on",
                f"write a {key} above 0 for at least one",
            )
    if mixture is None:
        return
    written = "weight" if has_weights else "epochs" if has_epochs else None
    if mixture.temperature is not None and written:
        raise ConfigError(
            f"data.mixture.temperature={mixture.temperature:g}",
            f"decides on shares, and so does {written} of data.train",
            "write one of the two",
        )
    if mixture.examples != "total" and has_epochs:
        raise ConfigError(
            f"data.mixture.examples={mixture.examples}",
            "decides on the length of a pass, and so do the epochs of data.train",
            "write weights, or delete data.mixture.examples",
        )


def _refuse_both(sources: list[MixedSource]) -> None:
    one = next(source for source in sources if source.epochs is not None)
    other = next(source for source in sources if source.weight is not None)
    raise ConfigError(
        f"data.train.{one.called}.epochs={one.epochs:g}",
        f"does not go with data.train.{other.called}.weight={other.weight:g}",
        "write weights for all sources or epochs, not both",
    )


MAX_SEED = 2**32 - 1


def check(config: Config) -> None:
    """Every rule that needs the config alone."""
    paths.check_storage(config.storage)
    _check_layout(config)
    _check_method(config)
    metrics.check(config.promote, config.train.objective, config.data.problem)
    objective_rules.check(config)
    parse_size(config.promote.max_shard_size, "promote.max_shard_size")
    check_data(config.data)
    if config.promote.max_overlap < 1:
        check_apart(config.data)
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


def methods_of(config: Config) -> list[str]:
    """Names of the methods of a run, or of the trials of its search."""
    line = config.search.space.get("method.name") if config.search is not None else None
    return [config.method.name] if line is None else list(map(str, line.values))


def _check_method(config: Config) -> None:
    method = config.method
    if getattr(method, "targets", None) == []:
        raise ConfigError("method.targets=[]", "adapts nothing", "write all-linear or some names")
    check_activations(method)
    check_promotion(config.promote.merge, config.promote.metrics, methods_of(config))
    if OBJECTIVES[config.train.objective].head:
        check_head(methods_of(config))
    if isinstance(method, LoraMethod) and method.dora and method.init in ("pissa", "olora"):
        raise ConfigError(
            f"method.init={method.init}",
            "takes a part out of the weights by whose length method.dora=true normalises",
            "write method.init: default, or method.dora: false",
        )
    if isinstance(method, FreezeMethod):
        _check_freeze(config, method)
    if isinstance(method, QloraMethod):
        _check_quantised(config)


def _check_quantised(config: Config) -> None:
    parallel = config.parallel
    sharded = parallel.strategy in ("fsdp", "deepspeed") or parallel.offload != "none"
    if sharded or parallel.replicas > 1:
        raise ConfigError(
            "method.name=qlora",
            "holds a base in 4 bits, which neither fsdp nor deepspeed shards here",
            "write parallel.strategy: ddp or single without offload, or method.name: lora",
        )
    if config.train.precision == "float64":
        raise ConfigError(
            "train.precision=float64",
            "is nothing that a base in 4 bits computes in",
            "write float32 or bfloat16",
        )


def _check_freeze(config: Config, method: FreezeMethod) -> None:
    if method.first is not None and method.last is not None:
        raise ConfigError(
            f"method.first={method.first}",
            f"counts the frozen blocks from below, and method.last={method.last} the others "
            "from above",
            "write one of the two",
        )
    parallel = config.parallel
    zero = parallel.strategy == "deepspeed" or parallel.offload == "optimizer"
    if method.unfreeze_every_examples is not None and zero:
        raise ConfigError(
            f"method.unfreeze_every_examples={method.unfreeze_every_examples}",
            "is nothing that deepspeed can do, whose moments all begin at once",
            "write parallel.strategy: ddp or fsdp, or leave the key out",
        )
