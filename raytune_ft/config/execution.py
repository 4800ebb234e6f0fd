"""Which runs can share one process and one base with others, and whether a sweep's trials do."""

from __future__ import annotations

import itertools
from typing import Any

from raytune_ft.config.load import apply_overrides, choose_strategy
from raytune_ft.config.methods import ACTIVATIONS, WHOLE_MODEL, LoraMethod
from raytune_ft.config.objectives import OBJECTIVES, SHARED_KEYS
from raytune_ft.config.reference import is_under, method_keys
from raytune_ft.config.schema import Config
from raytune_ft.config.search_rules import is_share
from raytune_ft.config.search_space import METHOD
from raytune_ft.errors import ConfigError

# What all slots of an engine have in common, since they share its base and its passes.
OF_THE_ENGINE = (
    "model",
    "data",
    "train.precision",
    "train.micro_tokens",
    "train.objective",
    *(f"train.{key}" for key in SHARED_KEYS),
)
# Each slot has an order of its own over the tokens that all share.
OF_A_SLOT = ("data.mixture", "data.curriculum")


def packable(config: Config) -> str | None:
    """None where runs like this one can be trained packed, else the reason why not."""
    method = config.method
    if method.name in ACTIVATIONS:
        return f"method.name={method.name} works on activations, which packed runs do not stack"
    if method.name in WHOLE_MODEL:
        return f"method.name={method.name} moves the weights that packed runs share"
    if not isinstance(method, LoraMethod):
        return f"method.name={method.name} is not stacked, as plain LoRA is"
    if OBJECTIVES[config.train.objective].head:
        return f"train.objective={config.train.objective} trains a head, which packed runs lack"
    if config.train.neftune_alpha is not None:
        noise = f"train.neftune_alpha={config.train.neftune_alpha}"
        return f"{noise} draws noise that depends on the layout"
    if method.dora:
        return "method.dora=true normalises by the weights of each run's own sum"
    if method.init in ("pissa", "olora"):
        return f"method.init={method.init} takes a part of its own out of the base"
    for key in ("rank_pattern", "alpha_pattern"):
        if getattr(method, key):
            return f"method.{key} gives layers of one run several scales, and a slot has one"
    if method.lr_ratio != 1.0:
        return f"method.lr_ratio={method.lr_ratio:g} gives one run two learning rates"
    if method.dropout > 0:
        return f"method.dropout={method.dropout} draws noise that depends on the layout"
    return None


def reason_against(config: Config) -> str | None:
    """None where any trial that the space allows can share an engine with any other."""
    assert config.search is not None
    if choose_strategy(config)[0] == "deepspeed":
        return "parallel.strategy=deepspeed builds on weights that it trains, and a base is frozen"
    for key in config.search.space:
        own = is_under(key, OF_A_SLOT) or is_share(key)
        if is_under(key, OF_THE_ENGINE) and not own:
            return f"search.space.{key} varies what trials of one engine share"
    return next(filter(None, map(packable, variants(config))), None)


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
    """A config for each method of the space with every bound and choice of its method's keys."""
    assert config.search is not None
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
