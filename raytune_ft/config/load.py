"""From a YAML file and overrides to a checked Config.

Importing this module loads neither torch nor ray nor transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytune_ft.config import environment, reference, rules, search_rules, yaml_text
from raytune_ft.config.data import called
from raytune_ft.config.explain import explain, shown_value
from raytune_ft.config.methods import DEFAULT_METHOD, METHODS
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.rewards import RewardConfig, weighed
from raytune_ft.config.schema import Config
from raytune_ft.config.search import KINDS
from raytune_ft.config.strategies import ALONE, REPLICATED, SHARDED, candidates
from raytune_ft.config.train import TrainConfig
from raytune_ft.errors import ConfigError

Notify = Callable[[str], None]


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    notify: Notify | None = None,
    ignore_search: bool = False,
) -> Config:
    """The config that a file and `section.key=value` overrides stand for.

    `notify` receives a line about each key that was dropped. Raises one ConfigError, whatever and
    however much is wrong.
    """
    data = yaml_text.read_mapping(path)
    changes = dict(parse_override(text) for text in overrides)
    data = _changed(data, changes, notify)
    if ignore_search and data.pop("search", None) is not None and notify is not None:
        notify("the search section is ignored: this is one run, not a sweep")
    environment.refuse_secrets(data)  # before any message may show a value
    return _with_defaults(_checked(data), notify)


def _with_defaults(config: Config, notify: Notify | None) -> Config:
    """The config with the defaults that depend on its objective, where it has no such key."""
    names, methods = rules.objectives_of(config), rules.methods_of(config)
    facts = OBJECTIVES[names[0]]
    found: dict[str, Any] = {}
    searched = config.search is not None and "train.lr" in config.search.space
    if "lr" not in config.train.model_fields_set and not searched:
        whole = [METHODS[method].whole_model for method in methods]
        own = TrainConfig.model_fields["lr"].default
        every = [OBJECTIVES[name].lr or (own, own) for name in names]
        rates = {lr[0 if each else 1] for lr in every for each in whole}
        if len(rates) > 1:
            raise ConfigError(
                "train.lr",
                "is not written, and its default differs between the objectives or methods of "
                f"search.space ({', '.join(f'{rate:g}' for rate in sorted(rates))})",
                "write it, or search it",
            )
        if facts.lr is not None:
            found["train.lr"] = rates.pop()
    if "too_long" not in config.data.model_fields_set and facts.drops:
        found["data.too_long"] = "drop"
    if facts.rollouts:
        found |= _of_rollouts(config)
    if not found:
        return config
    if notify is not None:
        shown = " and ".join(f"{key}={value}" for key, value in found.items())
        notify(f"{shown}: not written, and the default of train.objective={config.train.objective}")
    return apply_overrides(config, found)


def _of_rollouts(config: Config) -> dict[str, Any]:
    """Promotion lets models answer as in training, and goes by their rewards."""
    rollout, found = config.train.rollout, dict[str, Any]()
    same = {
        "max_new_tokens": rollout.max_completion_length,
        "temperature": rollout.temperature,
    }
    for key, value in same.items():
        if key not in config.sampling.model_fields_set and getattr(config.sampling, key) != value:
            found[f"sampling.{key}"] = value
    searches = config.search is not None and "metric" in config.search.model_fields_set
    if config.promote.metric is None and not searches:
        found["promote.metric"] = "reward"
        if config.search is not None:
            found["search.metric"] = "eval_reward"
    return found


def apply_overrides(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of a config with dotted keys replaced, checked like a file; raises ConfigError."""
    return _checked(_changed(to_plain(config), values, None))


def to_plain(config: Config) -> dict[str, Any]:
    """The config as dicts, lists, text and numbers; `load_config` of it gives the same config."""
    data = config.model_dump()
    if config.search is not None:
        data["search"]["space"] = {
            key: {line.kind: line.values, **({"when": line.when} if line.when else {})}
            for key, line in config.search.space.items()
        }
    return data


def dump_yaml(config: Config) -> str:
    """The config as a YAML text, every key written, `${ENV_NAME}` as it is."""
    return yaml_text.dump(to_plain(config))


def expand_env(
    config: Config, environ: Mapping[str, str] | None = None, rewards: bool = False
) -> Config:
    """A copy with every `${ENV_NAME}` replaced; ConfigError where one is not set.

    Those of `rewards` stay as they are unless asked for: the key of a judge is for the process that
    asks it, and runs go to other machines with their config.
    """
    plain = to_plain(config)
    kept = {} if rewards else {"rewards": plain.pop("rewards")}
    return validated(environment.expand(plain, environ=environ) | kept)


def asked_rewards(config: Config) -> list[RewardConfig]:
    """The rewards that a run asks while it trains; those that are only watched weigh nothing."""
    watched, rolls = config.train.watch, OBJECTIVES[config.train.objective].rollouts
    return [each for each in weighed(config.rewards, watched) if rolls or each.called in watched]


def needs_base(config: Config) -> bool:
    """Whether the losses read the log-probabilities of the model before training."""
    return OBJECTIVES[config.train.objective].base(config.train)


def holds_base(config: Config) -> bool:
    """Whether workers hold a copy of the model before training; under an adapter it is the base."""
    return needs_base(config) and METHODS[config.method.name].whole_model


def parse_override(text: str) -> tuple[str, Any]:
    """`section.key=value` as the dotted key and its value, read as YAML.

    A key that takes text takes the value as it is written, so that `model.revision=1e5` is text;
    one that takes text or a list reads a list where the value begins with a bracket.
    """
    dotted, equals, written = text.partition("=")
    if not equals or not dotted.strip():
        raise ConfigError(shown_value(text), "is not an override", "write section.key=value")
    dotted = dotted.strip()
    expected = _expected(_split(dotted))
    quoted = written[:1] in ("'", '"')
    if expected == "text" or expected == "text that is not empty" or dotted == "name":
        return dotted, yaml_text.parse(written, dotted) if quoted else written
    if expected == "text that is not empty or a list of values" and written[:1] != "[":
        return dotted, yaml_text.parse(written, dotted) if quoted else written
    if expected == "text or null" and not quoted:
        return dotted, None if written in ("null", "~", "") else written
    return dotted, yaml_text.parse(written, dotted)


def choose_strategy(config: Config, shortage: str | None = None) -> tuple[str, str]:
    """The strategy that `auto` stands for and the reason, or the written one.

    `shortage` says why a frozen base does not fit on a worker, where that is known.
    """
    parallel, method = config.parallel, METHODS[config.method.name]
    workers = parallel.max_workers
    if parallel.strategy != "auto":
        return parallel.strategy, "written in the config"
    if parallel.replicas > 1:
        return candidates(parallel)[0], f"parallel.replicas: {parallel.replicas}"
    if parallel.offload != "none":
        return candidates(parallel)[0], f"parallel.offload: {parallel.offload}"
    if workers == 1:
        return ALONE, "there is one worker"
    if method.whole_model:
        return SHARDED, f"weights of the model train: {workers} workers shard weights and moments"
    if method.quantised:
        return REPLICATED, f"a base in 4 bits is not sharded: {workers} workers each hold it"
    if shortage is not None:
        return SHARDED, f"the base is frozen, and {shortage}: {workers} workers shard it"
    return REPLICATED, f"the base is frozen: {workers} workers each hold it and share gradients"


def with_resources(config: Config, gpu: bool) -> Config:
    """A copy in which what a worker reserves is concrete; raises ConfigError where a rule forbids
    it. `gpu`: the cluster, or else this machine, has a GPU.
    """
    gpu = gpu or config.parallel.accelerator is not None
    written = config.parallel.resources_per_worker
    found = {"CPU": 1.0, "GPU": float(gpu)} | (written if isinstance(written, dict) else {})
    return apply_overrides(config, {"parallel.resources_per_worker": found})


def memory_decides(config: Config) -> bool:
    """Whether `auto` depends on whether the base fits on a worker."""
    parallel, method = config.parallel, METHODS[config.method.name]
    automatic = parallel.strategy == "auto" and parallel.offload == "none"
    several = automatic and parallel.max_workers > 1
    return several and not method.whole_model and not method.quantised


def _checked(data: dict[str, Any]) -> Config:
    config = validated(data)
    rules.check(config)
    if config.search is not None:
        search_rules.check_space(config, apply_overrides)
    return config


def validated(data: dict[str, Any]) -> Config:
    """The Config of plain values, checked key by key; raises ConfigError for the first mistake."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise explain(error, data) from None


def _changed(
    data: dict[str, Any], changes: Mapping[str, Any], notify: Notify | None
) -> dict[str, Any]:
    """A copy of the file's data with the overrides applied, `method.name` first."""
    data = copy.deepcopy(data)
    if "method.name" in changes:
        _switch_method(data, changes["method.name"], notify)
    for dotted, value in changes.items():
        _set(data, _split(dotted), value)
    return data


def _switch_method(data: dict[str, Any], name: Any, notify: Notify | None) -> None:
    """Drops the keys of the file's method, also from the space, that the method `name` lacks."""
    written = data.get("method", {})
    if not isinstance(written, dict) or not isinstance(name, str):
        return
    if name not in reference.methods() or name == written.get("name", DEFAULT_METHOD):
        return
    own = reference.method_keys(name)
    others = {key for other in reference.methods() for key in reference.method_keys(other)} - own
    dropped = [f"method.{key}" for key in written if f"method.{key}" in others]
    data["method"] = {key: item for key, item in written.items() if f"method.{key}" not in dropped}
    search = data.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    if isinstance(space, dict) and "method.name" not in space:
        searched = [key for key in space if key in others]
        for key in searched:
            del space[key]
        dropped += [f"search.space.{key}" for key in searched]
    if dropped and notify is not None:
        notify(f"method.name={name} drops the file's {', '.join(dropped)}")


def _split(dotted: str) -> tuple[str, ...]:
    """The keys of a dotted path; a line of the search space, a resource and a label keep their
    dots.
    """
    free = ("resources_per_worker", "label_selector")
    for prefix in (("search", "space"), *(("parallel", name) for name in free)):
        start = ".".join(prefix) + "."
        if dotted.startswith(start):
            rest = dotted[len(start) :]
            key, _, kind = rest.rpartition(".")
            if prefix == ("search", "space") and key and kind in (*KINDS, "when"):
                return (*prefix, key, kind)
            return (*prefix, rest)
    return tuple(dotted.split("."))


def _set(data: dict[str, Any], parts: tuple[str, ...], value: Any) -> None:
    here = data
    for depth, part in enumerate(parts[:-1], start=1):
        inner = here.get(part)
        if isinstance(inner, list) and reference.is_listed(parts[:depth]):
            _set_in_list(inner, parts, depth, value)
            return
        if not isinstance(here.get(part), dict):
            field = reference.field_at(parts[:depth])
            default = (
                field.get_default(call_default_factory=True, validated_data={}) if field else 0
            )
            here[part] = dict(default) if isinstance(default, dict) else {}
        here = here[part]
    if parts[:2] == ("search", "space") and len(parts) == 3 and value is None:
        here.pop(parts[2], None)
        return
    if parts[:2] == ("search", "space") and len(parts) == 4 and parts[3] in KINDS:
        for kind in KINDS:
            here.pop(kind, None)
    here[parts[-1]] = copy.deepcopy(value)


def _set_in_list(items: list[Any], parts: tuple[str, ...], depth: int, value: Any) -> None:
    """`data.train.NAME.KEY`: a key of one of several sources."""
    path, name = ".".join(parts[:depth]), parts[depth]
    if len(parts) != depth + 2:
        raise ConfigError(
            f"{'.'.join(parts)}={shown_value(value)}",
            f"names no key of a source, and {path} is a list of sources",
            f"write {path}.NAME.KEY",
        )
    try:
        called(items, name)[parts[-1]] = copy.deepcopy(value)
    except KeyError as error:
        raise ConfigError(
            ".".join(parts), f"names no source of {path}, which has {error.args[0]}", "write one"
        ) from None


def _expected(parts: tuple[str, ...]) -> str:
    field = reference.field_at(parts)
    return reference.words(field) if field is not None else ""
