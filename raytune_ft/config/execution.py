"""Which runs can be trained packed, and whether the trials of a sweep are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from raytune_ft.config.load import apply_overrides, choose_strategy
from raytune_ft.config.methods import METHODS, LoraMethod
from raytune_ft.config.objectives import OBJECTIVES, SHARED_KEYS
from raytune_ft.config.reference import is_under, method_keys
from raytune_ft.config.rules import OBJECTIVE
from raytune_ft.config.schema import Config
from raytune_ft.config.search import Distribution
from raytune_ft.config.search_rules import is_share
from raytune_ft.config.search_space import METHOD
from raytune_ft.config.strategies import STRATEGIES
from raytune_ft.errors import ConfigError

# Keys with one value for all slots of an engine, since slots share its base and its passes.
OF_THE_ENGINE = (
    "model",
    "data",
    "train.precision",
    "train.deterministic",
    "train.micro_tokens",
    OBJECTIVE,
    "train.dpo.reference",
    "train.rollout.temperature",
    "train.watch",
    "rewards",
    *(f"train.{key}" for key in SHARED_KEYS),
)
# Each slot has its own order over the examples that all share.
OF_A_SLOT = ("data.mixture", "data.curriculum")


def packable(config: Config) -> str | None:
    """Why runs with this config cannot be trained packed, None where they can."""
    name, facts = config.method.name, METHODS[config.method.name]
    if facts.on_activations:
        return f"method.name={name} works on activations, and packed runs stack weights"
    if facts.whole_model:
        return f"method.name={name} trains the weights that packed runs share"
    if not facts.packable:
        return f"method.name={name} cannot be stacked as plain LoRA can"
    if (why := OBJECTIVES[config.train.objective].unpackable) is not None:
        return f"train.objective={config.train.objective} {why}"
    if OBJECTIVES[config.train.objective].head:
        return f"train.objective={config.train.objective} trains a head, which packed runs lack"
    if config.train.neftune_alpha is not None:
        noise = f"train.neftune_alpha={config.train.neftune_alpha}"
        return f"{noise} draws noise that depends on the layout"
    return config.method.unpackable()


def reason_against(config: Config) -> str | None:
    """Why the trials of a sweep cannot be packed, None where all that the space allows can."""
    assert config.search is not None
    strategy = choose_strategy(config)[0]
    if (why := STRATEGIES[strategy].unpackable) is not None:
        return f"parallel.strategy={strategy} {why}"
    for key, line in config.search.space.items():
        own = is_under(key, OF_A_SLOT) or is_share(key) or _of_pairs(key, line)
        if is_under(key, OF_THE_ENGINE) and not own:
            return f"search.space.{key} varies what trials of one engine share"
    return next(filter(None, map(packable, variants(config))), None)


def _of_pairs(key: str, line: Distribution) -> bool:
    """Whether a line searches over objectives that read the same outputs for the same pairs."""
    facts = [OBJECTIVES[name] for name in map(str, line.values) if name in OBJECTIVES]
    return key == OBJECTIVE and all(each.pairs and not each.head for each in facts)


def choose_execution(config: Config) -> tuple[str, str]:
    """`packed` or `isolated`, and why.

    Raises:
        ConfigError: `search.execution: packed` for trials that cannot be packed.
    """
    assert config.search is not None
    written, reason = config.search.execution, reason_against(config)
    if written == "isolated":
        return "isolated", reason or "written in the config"
    if reason is None:
        return "packed", "trials share one frozen base"
    if written == "packed":
        raise ConfigError(
            "search.execution=packed",
            f"trains LoRA trials on one frozen base, and {reason}",
            "write search.execution: isolated, or auto",
        )
    return "isolated", reason


def variants(config: Config) -> list[Config]:
    """A config for each method of the space with every bound and choice of its method's keys; of a
    run without a search its own.
    """
    if config.search is None:
        return [config]
    alone = config.model_copy(update={"search": None})
    space = config.search.space
    names = space[METHOD].values if METHOD in space else [config.method.name]
    found = []
    for name in names:
        own: dict[str, list[Any]] = {
            key: line.values
            for key, line in space.items()
            if key.startswith("method.") and key != METHOD and key in method_keys(name)
        }
        for values in list(itertools.zip_longest(*own.values())) or [()]:
            params = {k: v for k, v in zip(own, values, strict=True) if v is not None}
            found.append(apply_overrides(alone, {METHOD: name, **params}))
    return found


MAX_SLOTS = 16
"""More slots cost memory and gain little: a forward pass is large enough by then."""
TRIALS_PER_SLOT = 6
"""A slot costs a process of Ray Tune, about 2 s of one core, which fewer trials do not save."""


@dataclass(frozen=True)
class Arrangement:
    """`at_once` trials in `engines` worker groups of `slots` slots each, for adapters up to the
    rank of `method`. `measured`: the engine measures whether fewer slots are as fast.
    """

    at_once: int
    engines: int
    slots: int
    method: LoraMethod
    measured: bool


def arrange(config: Config, fit: int, trials: int, fill_pass: int) -> Arrangement:
    """Engines and slots for `trials` trials on a cluster that holds `fit` worker groups.

    `fill_pass` is the number of trials whose steps fill one forward pass. There are at least two
    slots, so that an engine has work while Ray Tune asks for the next trial.
    """
    assert config.search is not None
    written = config.search.max_concurrent
    useful = max(2, min(MAX_SLOTS, trials // (fit * TRIALS_PER_SLOT), fill_pass))
    at_once = min(fit * useful if written == "auto" else written, trials)
    engines = min(fit, at_once)
    methods = [each.method for each in variants(config) if isinstance(each.method, LoraMethod)]
    largest = max(methods, key=lambda method: method.rank)
    return Arrangement(at_once, engines, -(-at_once // engines), largest, written == "auto")
