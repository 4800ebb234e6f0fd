"""Checks over more than one key. They refuse and never rewrite; each raises ConfigError."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from raytune_ft.config import metrics, paths, rewards
from raytune_ft.config.data import (
    FORMATS,
    DataConfig,
    MixedSource,
    NamedSource,
    SourceConfig,
    listed,
    source_configs,
)
from raytune_ft.config.explain import shown_value
from raytune_ft.config.methods import METHODS, LoraMethod, MethodConfig
from raytune_ft.config.objectives import LOSS, OBJECTIVES, REWARD, ObjectiveFacts, figures
from raytune_ft.config.reference import is_under, one_of
from raytune_ft.config.schema import Config, ParallelConfig, PromoteConfig
from raytune_ft.config.search_rules import check_budget, check_examples, check_search
from raytune_ft.config.search_space import duration_s
from raytune_ft.config.section import Section, parse_size
from raytune_ft.config.strategies import STRATEGIES, candidates
from raytune_ft.config.train import TrainConfig
from raytune_ft.errors import ConfigError

SPLITS = ("train", "validation", "test")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_SELECTED = re.compile(rf"!?(?:{_LABEL}|in\({_LABEL}(?:, ?{_LABEL})*\))")


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
                    f"data.test={shown_value(source.shown)}",
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
_RESOURCES = "parallel.resources_per_worker"


def check(config: Config) -> None:
    """Every rule that needs the config alone."""
    paths.check_storage(config.storage)
    _check_layout(config)
    _check_method(config)
    rewards.check(config.rewards)
    metrics.check(config)
    check_objective(config)
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
    _check_strategy(parallel)
    if isinstance(parallel.wait_for_nodes, str) and parallel.wait_for_nodes != "auto":
        duration_s(parallel.wait_for_nodes, "parallel.wait_for_nodes")
    _check_precision(config)
    _check_resources(parallel)
    for label, value in parallel.label_selector.items():
        if not _SELECTED.fullmatch(value):
            raise ConfigError(
                f"parallel.label_selector={shown_value({label: value})}",
                "holds a value that no label has",
                "write a text such as spot, !spot, in(spot, on-demand) or !in(spot, on-demand)",
            )


def _check_resources(parallel: ParallelConfig) -> None:
    for name, amount in parallel.resources.items():
        if amount < 0:
            raise ConfigError(f"{_RESOURCES}.{name}={amount:g}", "is below 0", "write 0 or more")
    cpus, gpus = parallel.resources["CPU"], parallel.resources["GPU"]
    if cpus == 0:
        raise ConfigError(f"{_RESOURCES}.CPU=0", "gives a worker no CPU", "write 1 or more")
    if gpus > 1:
        raise ConfigError(
            f"{_RESOURCES}.GPU={gpus:g}",
            "is more than a worker uses: each computes on one GPU",
            "write GPU: 1, and as many parallel.workers as a run is to have GPUs",
        )
    if 0 < gpus < 1 and parallel.max_workers > 1:
        raise ConfigError(
            f"{_RESOURCES}.GPU={gpus:g}",
            f"puts several of parallel.workers={parallel.workers} on one GPU, which NCCL refuses",
            "write GPU: 1, or parallel.workers: 1",
        )


def _check_strategy(parallel: ParallelConfig) -> None:
    """Keys that only some strategies support."""
    strategy = parallel.strategy
    written = STRATEGIES.get(strategy)
    if written is not None and written.one_process and parallel.max_workers > 1:
        several = [name for name, facts in STRATEGIES.items() if not facts.one_process]
        raise ConfigError(
            f"parallel.strategy={strategy}",
            f"runs in one process, and parallel.workers={parallel.workers}",
            f"write {one_of(['auto', *several])}, or parallel.workers: 1",
        )
    if parallel.replicas > 1:
        _check_replicas(parallel)
    for name, facts in STRATEGIES.items():
        for key in facts.own_keys:
            value = getattr(parallel, key)
            if strategy != name and value != ParallelConfig.model_fields[key].default:
                raise ConfigError(
                    f"parallel.{key}={shown_value(value)}",
                    f"is for {name}, and parallel.strategy={strategy}",
                    f"write parallel.strategy: {name}, or leave the key out",
                )
    able = [name for name, facts in STRATEGIES.items() if parallel.offload in facts.offload]
    if parallel.offload != "none" and strategy not in ("auto", *able):
        raise ConfigError(
            f"parallel.offload={parallel.offload}",
            f"is not supported by {strategy}",
            f"write parallel.strategy: {' or '.join(able)}, or parallel.offload: none",
        )
    if written is not None:
        written.check(parallel)


def _check_replicas(parallel: ParallelConfig) -> None:
    able = {name: facts for name, facts in STRATEGIES.items() if facts.replicas}
    if parallel.elastic or parallel.max_workers % parallel.replicas:
        raise ConfigError(
            f"parallel.replicas={parallel.replicas}",
            f"does not divide parallel.workers={parallel.workers}"
            if not parallel.elastic
            else f"needs a fixed number of workers, not parallel.workers={parallel.workers}",
            "write a divisor of the number of workers, or 1",
        )
    if parallel.strategy not in ("auto", *able):
        raise ConfigError(
            f"parallel.replicas={parallel.replicas}",
            f"is for {one_of(able)}, and parallel.strategy={parallel.strategy}",
            f"write parallel.strategy: {' or '.join(able)}, or parallel.replicas: 1",
        )
    offloads = {offload for facts in able.values() for offload in facts.offload}
    if parallel.offload not in ("none", *offloads):
        raise ConfigError(
            f"parallel.replicas={parallel.replicas}",
            f"is for {one_of(able)}, which does not support parallel.offload={parallel.offload}",
            f"write parallel.offload: {' or '.join(sorted({'none', *offloads}))}, or "
            "parallel.replicas: 1",
        )


def _check_precision(config: Config) -> None:
    parallel, names = config.parallel, candidates(config.parallel)
    if config.train.precision == "float64" and not any(STRATEGIES[n].float64 for n in names):
        another = (
            "parallel.offload: none" if parallel.strategy == "auto" else "another parallel.strategy"
        )
        raise ConfigError(
            "train.precision=float64",
            f"is not supported by {one_of(names)}",
            f"write float32 or bfloat16, or {another}",
        )


def methods_of(config: Config) -> list[str]:
    """Names of the methods of a run, or of the trials of its search."""
    line = config.search.space.get("method.name") if config.search is not None else None
    names = [config.method.name] if line is None else list(map(str, line.values))
    return [name for name in names if name in METHODS]  # others are refused with the search space


OBJECTIVE = "train.objective"


def objectives_of(config: Config) -> list[str]:
    """The objectives of a run, or of the trials of its search."""
    line = config.search.space.get(OBJECTIVE) if config.search is not None else None
    names = [config.train.objective] if line is None else list(map(str, line.values))
    return [name for name in names if name in OBJECTIVES] or [config.train.objective]


def _check_method(config: Config) -> None:
    method, tried = config.method, methods_of(config)
    method.check()
    _check_promotion(config.promote, tried)
    headless = next((name for name in tried if METHODS[name].on_activations), None)
    if OBJECTIVES[config.train.objective].head and headless is not None:
        raise ConfigError(
            f"method.name={headless}",
            f"cannot train the head that train.objective={config.train.objective} needs",
            "write lora, freeze or full",
        )
    refusals = [refusal(method, name) for name in candidates(config.parallel)]
    if refusals and (error := refusals[0]) is not None and None not in refusals:
        raise error
    if METHODS[method.name].quantised and config.train.precision == "float64":
        raise ConfigError(
            "train.precision=float64",
            f"is not supported with method.name={method.name}, whose base is held in 4 bits",
            "write float32 or bfloat16",
        )


def refusal(method: MethodConfig, strategy: str) -> ConfigError | None:
    """The error that says why a strategy cannot train a method, None where it can."""
    facts = STRATEGIES[strategy]
    if METHODS[method.name].quantised and facts.shards:
        whole = [name for name, other in STRATEGIES.items() if not other.shards]
        return ConfigError(
            f"method.name={method.name}",
            f"holds its base in 4 bits, which {strategy} does not shard",
            f"write parallel.strategy: {one_of(whole)} without offload and replicas, or another "
            "method",
        )
    if method.late_groups is not None and not facts.late_groups:
        late = [name for name, other in STRATEGIES.items() if other.late_groups]
        return ConfigError(
            method.late_groups,
            f"is not supported with {strategy}, which creates all optimizer moments at the start",
            f"write parallel.strategy: {one_of(late)} without offload: optimizer, or leave the key "
            "out",
        )
    return None


def _check_promotion(promote: PromoteConfig, methods: list[str]) -> None:
    """Methods on activations leave nothing that could be merged or read as a plain model."""
    name = next((name for name in methods if METHODS[name].on_activations), None)
    if name is None:
        return
    if promote.merge != "best":
        raise ConfigError(
            f"promote.merge={promote.merge}",
            f"merges weights, and method.name={name} changes none",
            "write promote.merge: best",
        )
    task = next((metric for metric in promote.metrics if metric.startswith("lm_eval:")), None)
    if task is not None:
        raise ConfigError(
            f"promote.metrics={task}",
            f"evaluates a plain model, and method.name={name} works on activations",
            "leave it out",
        )


OF_THE_TEACHER = ("model", "train.precision", "train.kd.teacher")
"""Keys that a teacher's logits depend on, beside the data."""


def check_objective(config: Config) -> None:
    """Raises ConfigError where keys and sources are not those of the objective."""
    train, facts = config.train, OBJECTIVES[config.train.objective]
    for name, source in source_configs(config.data).items():
        label = f"data.{name}"
        if source.format not in facts.formats:
            fits = [name for name, one in OBJECTIVES.items() if source.format in one.formats]
            raise ConfigError(
                f"{label}.format={source.format}",
                f"is not a format that train.objective={train.objective} learns from",
                f"write format: {one_of(facts.formats)}, or train.objective: {one_of(fits)}",
            )
        _check_source(label, source)
        if source.margin is not None and train.objective != "reward":
            raise ConfigError(
                f"{label}.margin={source.margin}",
                f"has no effect with train.objective={train.objective}",
                "leave it out, or write train.objective: reward",
            )
    named = {source.chat_template for source in source_configs(config.data).values()} - {None}
    if len(named) > 1:
        raise ConfigError(
            f"data.*.chat_template={one_of(sorted(filter(None, named)))}",
            "differs between sources, and a model has one chat template",
            "write the same in all of them",
        )
    _check_keys(config, facts)
    _check_dpo(config.train)
    _check_rollouts(config, facts)
    problem = config.data.problem
    if train.label_smoothing > 0 and not (facts.smooth and problem == "single_label"):
        under = f"data.problem={problem}"
        if not facts.smooth:
            under = f"train.objective={train.objective}"
        raise ConfigError(
            f"train.label_smoothing={train.label_smoothing}",
            f"has no distribution to smooth under {under}",
            "write 0",
        )
    chunk = config.data.chunk
    if chunk is not None and chunk.overlap >= config.data.max_length - 1:
        raise ConfigError(
            f"data.chunk.overlap={chunk.overlap}",
            f"leaves no room for new tokens in data.max_length={config.data.max_length}",
            f"write less than {config.data.max_length - 1}",
        )
    if config.search is not None:
        _check_metrics(config)
        _check_kept_teacher(config)
        _check_kept_reference(config)


def _check_keys(config: Config, facts: ObjectiveFacts) -> None:
    train, defaults = config.train, type(config.train).model_fields
    for name, other in OBJECTIVES.items():
        for key in other.keys:
            written = getattr(train, key)
            watched = key == "rollout" and bool(train.watch)
            if key not in facts.keys and not watched and written != defaults[key].default:
                if isinstance(written, Section):
                    written = written.model_dump(exclude_defaults=True)
                raise ConfigError(
                    f"train.{key}={shown_value(written)}",
                    f"is for train.objective={name}, and this is {train.objective}",
                    f"write train.objective: {name}, or leave the key out",
                )
    if facts.teacher and train.kd is None:
        raise ConfigError(
            f"train.objective={train.objective}",
            "needs a teacher",
            "write train.kd: {teacher: a model}",
        )
    formats = [source.format for source in listed(config.data.train)]
    documents = [name for name, entry in FORMATS.items() if entry.documents]
    if config.data.chunk is not None and not any(FORMATS[name].documents for name in formats):
        raise ConfigError(
            f"data.chunk={shown_value(config.data.chunk.model_dump())}",
            f"cuts documents, and data.train.format={formats[0]} has none",
            f"write format: {one_of(documents)}, or leave the key out",
        )
    labelled = facts.head and not facts.pairs
    if not labelled and (config.data.labels is not None or config.data.problem != "single_label"):
        key = "labels" if config.data.labels is not None else "problem"
        heads = one_of(name for name, one in OBJECTIVES.items() if one.head and not one.pairs)
        raise ConfigError(
            f"data.{key}={shown_value(getattr(config.data, key))}",
            f"is for train.objective={heads}, and this is {train.objective}",
            f"write train.objective: {heads}, or leave the key out",
        )


def _check_rollouts(config: Config, facts: ObjectiveFacts) -> None:
    """Raises ConfigError where what the model says cannot be scored or learnt from."""
    train, named = config.train, [reward.called for reward in config.rewards]
    for name in train.watch:
        if name not in named:
            raise ConfigError(
                f"train.watch={name}",
                "names no reward",
                f"write {one_of(named)}" if named else "write it in rewards",
            )
    if train.watch and facts.head:
        raise ConfigError(
            f"train.watch={shown_value(train.watch)}",
            f"scores completions, and train.objective={train.objective} trains a model that gives "
            "numbers",
            "leave the key out",
        )
    comparing = [each for each in config.rewards if each.compares]
    if comparing and facts.rollouts and not facts.compares:
        raise ConfigError(
            f"rewards.{comparing[0].called}",
            f"compares completions, and train.objective={train.objective} learns from each by "
            "itself",
            "write mode: grade, or train.objective: grpo or online_dpo",
        )
    trained = rewards.weighed(config.rewards, train.watch) if facts.rollouts else []
    win_rate = f"win_rate:{comparing[0].called}" if comparing else ""
    if comparing and trained and all(each.compares or not each.weight for each in trained):
        of_one_model = config.promote.metric is None or not metrics.compares(config.promote.metric)
        if of_one_model:
            raise ConfigError(
                f"rewards.{comparing[0].called}",
                "compares completions, so that promotion has no reward of a model by itself",
                f"write promote: {{metrics: [{win_rate}], metric: {win_rate}}}, or mode: grade",
            )
    _check_vllm(config)
    if not facts.rollouts:
        return
    if not config.rewards:
        raise ConfigError(
            f"train.objective={train.objective}",
            "needs a reward",
            "write rewards: [FILE.py:FUNCTION], or one of " + one_of(rewards.REWARDS),
        )
    if all(reward.weight == 0 or reward.called in train.watch for reward in config.rewards):
        raise ConfigError(
            "rewards",
            "have the weight 0 or stand in train.watch, which leaves nothing to learn from",
            "give one of them a weight, and do not watch it",
        )
    if train.dpo.reference is not None:
        raise ConfigError(
            f"train.dpo.reference={train.dpo.reference}",
            f"is for preferences that are given, and train.objective={train.objective} compares "
            "with the model before training",
            "leave the key out",
        )
    if facts.compares and train.rollout.num_generations < 2:
        raise ConfigError(
            f"train.rollout.num_generations={train.rollout.num_generations}",
            f"leaves train.objective={train.objective} no other completion to compare with",
            "write at least 2, or train.objective: ppo",
        )
    grpo = train.grpo
    if grpo.gate is not None and grpo.gate not in named:
        raise ConfigError(
            f"train.grpo.gate={grpo.gate}", "names no reward", f"write {one_of(named)}"
        )
    if grpo.loss_type == "cispo" and grpo.high <= 1:
        raise ConfigError(
            f"train.grpo.epsilon_high={shown_value(grpo.epsilon_high)}",
            "is the largest ratio under train.grpo.loss_type=cispo, and every ratio begins at 1",
            "write for example epsilon_high: 5",
        )
    if grpo.importance_sampling_level == "sequence" and grpo.loss_type == "cispo":
        raise ConfigError(
            "train.grpo.importance_sampling_level=sequence",
            "does not go with train.grpo.loss_type=cispo, which weighs tokens",
            "write loss_type: grpo, or importance_sampling_level: token",
        )


VLLM_MAX_RANK = 512
"""The largest `max_lora_rank` of vLLM."""
VLLM_IGNORES = ("dora", "rank_pattern", "alpha_pattern")
"""Keys of `method` whose adapters vLLM refuses, or loads as if they were not there."""


def _check_vllm(config: Config) -> None:
    """Raises ConfigError where vLLM could not take the weights, or would have no use."""
    own, method, precision = config.train.rollout, config.method, config.train.precision
    written, embedded = "train.rollout.engine=vllm", "train.rollout.engine: embedded"
    if not own.on_vllm:
        if own.vllm != type(own).model_fields["vllm"].default:
            raise ConfigError(
                f"train.rollout.vllm={shown_value(own.vllm.model_dump())}",
                f"is for {written}, and this is {own.engine}",
                "write engine: vllm, or leave the key out",
            )
        return
    if not METHODS[method.name].vllm:
        loaded = one_of(name for name, facts in METHODS.items() if facts.vllm)
        raise ConfigError(
            f"method.name={method.name}",
            f"leaves weights that vLLM does not load, and {written}",
            f"write method.name: {loaded}, or {embedded}",
        )
    fits = ["bfloat16"] if isinstance(method, LoraMethod) else ["bfloat16", "float32"]
    if precision not in fits:
        raise ConfigError(
            f"train.precision={precision}",
            f"is not in vLLM with method.name={method.name}, and {written}",
            f"write train.precision: {one_of(fits)}, or {embedded}",
        )
    if isinstance(method, LoraMethod):
        key = next((key for key in VLLM_IGNORES if getattr(method, key)), None)
        if key is not None:
            value = shown_value(getattr(method, key))
            raise ConfigError(
                f"method.{key}={value}", f"is not in vLLM, and {written}", f"write {embedded}"
            )
        if (rank := method.exported_rank) > VLLM_MAX_RANK:
            raise ConfigError(
                f"method.rank={method.rank}",
                f"makes an adapter of rank {rank}, and vLLM takes up to {VLLM_MAX_RANK}",
                f"write a smaller rank, or {embedded}",
            )
    if config.search is not None:
        raise ConfigError(
            written,
            "is for one run, and each trial of a search would start engines",
            f"write {embedded}",
        )


NO_DIVERGENCE = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sft")
"""Losses of `dpo` that do not go by the scores of an f-divergence."""


def _check_dpo(train: TrainConfig) -> None:
    dpo = train.dpo
    if dpo.f_divergence_type != "reverse_kl" and set(dpo.losses) <= set(NO_DIVERGENCE):
        raise ConfigError(
            f"train.dpo.f_divergence_type={dpo.f_divergence_type}",
            f"has no effect with train.dpo.loss_type={shown_value(dpo.loss_type)}",
            "leave it out, or write another loss_type such as sigmoid",
        )
    if dpo.loss_weights is not None and len(dpo.loss_weights) != len(dpo.losses):
        raise ConfigError(
            f"train.dpo.loss_weights={shown_value(dpo.loss_weights)}",
            f"has {len(dpo.loss_weights)} numbers, and train.dpo.loss_type names {len(dpo.losses)} "
            f"loss{'es' * (len(dpo.losses) > 1)}",
            f"write {len(dpo.losses)}",
        )
    if "exo_pair" in dpo.losses and dpo.label_smoothing == 0:
        raise ConfigError(
            "train.dpo.label_smoothing=0",
            "makes the loss of train.dpo.loss_type=exo_pair infinite",
            "write for example 0.001",
        )
    smoothed = {"robust", "exo_pair"} & set(dpo.losses)
    if dpo.label_smoothing and not smoothed:
        raise ConfigError(
            f"train.dpo.label_smoothing={dpo.label_smoothing:g}",
            f"has no effect with train.dpo.loss_type={shown_value(dpo.loss_type)}",
            "leave it out, or write loss_type: robust or exo_pair",
        )


def _check_source(label: str, source: SourceConfig) -> None:
    owned = dict.fromkeys(key for entry in FORMATS.values() for key in entry.keys)
    for key in owned:
        formats = [name for name, entry in FORMATS.items() if key in entry.keys]
        value = getattr(source, key)
        default = type(source).model_fields[key].default
        if value != default and source.format not in formats:
            raise ConfigError(
                f"{label}.{key}={shown_value(value)}",
                f"is for format: {one_of(formats)}, and this is {source.format}",
                "leave it out",
            )
    if source.rows == "file" and any(paths.file_kind(path)[0] != ".txt" for path in source.paths):
        raise ConfigError(f"{label}.rows=file", "is for .txt files", "leave it out")
    if source.rationale_until is not None:
        try:
            re.compile(source.rationale_until)
        except re.error as error:
            raise ConfigError(
                f"{label}.rationale_until={shown_value(source.rationale_until)}",
                f"is not a regular expression ({error})",
                r"write one such as '####\s*'",
            ) from None


def _check_kept_teacher(config: Config) -> None:
    """The logits file is of one teacher, so no trial may change what they depend on."""
    assert config.search is not None
    if config.train.kd is None or config.train.kd.cache == "memory":
        return
    for key in config.search.space:
        if key == "train.kd" or is_under(key, OF_THE_TEACHER):
            raise ConfigError(
                f"search.space.{key}",
                "changes the teacher's logits, and train.kd.cache=disk keeps those of one teacher",
                "write train.kd.cache: memory, or delete the line",
            )


def _check_kept_reference(config: Config) -> None:
    """One reference serves all trials, in the precision in which they compute."""
    assert config.search is not None
    needed = any(OBJECTIVES[name].reference for name in objectives_of(config))
    key = next((key for key in config.search.space if key in OF_THE_REFERENCE), None)
    if needed and key is not None:
        raise ConfigError(
            f"search.space.{key}",
            "changes the numbers of the reference, which is computed once for all trials",
            f"delete the line and set {key} once",
        )


OF_THE_REFERENCE = ("train.precision", "model.dtype", "model.attention")


def _check_metrics(config: Config) -> None:
    assert config.search is not None
    data, names = config.data, objectives_of(config)
    objective = one_of(names)
    of_all = [figures(name, data.problem, trained=True) for name in names]
    of_each = [[each.name for each in own if not each.neutral] for own in of_all]
    given = [name for name in of_each[0] if all(name in each for each in of_each)]
    _check_scale(config, given)
    several = data.train if isinstance(data.validation, float) else data.validation
    named = several if isinstance(several, list) else []
    of_sources = [f"eval_loss:{source.called}" for source in named]
    rolls = all(OBJECTIVES[name].rollouts for name in names)
    scored = [each.called for each in config.rewards] if rolls else config.train.watch
    of_sources += [f"{REWARD.name}:{name}" for name in scored]
    for metric in config.search.metrics:
        if metric not in (*given, *of_sources):
            raise ConfigError(
                f"search.metric={metric}",
                f"is not a figure of train.objective={objective}",
                f"write {one_of((*given, *of_sources))}"
                + ", or name the reward in train.watch"
                * (metric.startswith(f"{REWARD.name}:") and not rolls),
            )


def _check_scale(config: Config, given: Sequence[str]) -> None:
    """The losses of trials compare: the objective and what scales it are the same for all. `given`
    are the figures that every trial has.
    """
    search = config.search
    assert search is not None
    if LOSS.name not in search.metrics:
        return
    facts = [OBJECTIVES[name] for name in objectives_of(config)]
    scaled = [f"train.{key}" for each in facts if each.scaled for key in each.keys]
    if any(each.pairs for each in facts):
        scaled.append(OBJECTIVE)
    key = next((key for key in search.space if is_under(key, scaled)), None)
    if key is None:
        return
    raise ConfigError(
        f"search.metric={LOSS.name}",
        f"has a different scale for each {key}",
        f"write search.metric: {one_of([name for name in given if name != LOSS.name])}",
    )
