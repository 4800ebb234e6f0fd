"""Which configs are the same experiment, and what a resume may change."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

from raytune_ft.config.data import CurriculumConfig
from raytune_ft.config.explain import shown_value
from raytune_ft.config.load import expand_env, to_plain
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.reference import is_under
from raytune_ft.config.schema import Config
from raytune_ft.config.train import TrainConfig
from raytune_ft.errors import ConfigError

# Layout and housekeeping: no key here changes a weight, so a resume may change all of them.
FREE = (
    "storage",
    "parallel",
    "checkpoint",
    "data.packing",
    "train.deterministic",
    "train.micro_tokens",
    "train.kd.cache",
    "train.kd.cache_limit_gib",
    "train.rollout.keep",
    "train.rollout.vllm",
    "train.watch",
    "search.max_concurrent",
    "search.execution",
    "search.storage",
    "search.budget",
    "promote",
    "tracking",
    "sampling",
)
# Of a reward, what does not change a score.
FREE_OF_REWARDS = (
    *("timeout_s", "batch_tokens"),
    *("url", "api_key", "retries", "answers", "at_once"),
)
BUDGET = ("train.epochs", "train.max_examples")
_MISSING = object()
# Where Ray unpacks the files of a job, which is another place for each session and package. The
# data themselves are compared by content.
_UNPACKED = re.compile(r"^/.*/working_dir_files/_ray_pkg_[0-9a-f]+/")


def config_sha256(config: Config) -> str:
    """Hash of everything that decides the weights after a number of examples.

    Equal hashes mean equal weights after equally many examples, so the budget counts only where
    the learning rate depends on it. `${ENV_NAME}` is expanded first. `search` is left out, since
    each trial has a config of its own.
    """
    flat = _flat(to_plain(expand_env(config)))
    depends = depends_on_horizon(config.train, config.data.curriculum)
    ignored = (*FREE, "name", "search", *(() if depends else BUDGET))
    kept = {
        key: value
        for key, value in flat.items()
        if not (is_under(key, ignored) or _is_free_reward(key, config))
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def depends_on_horizon(train: TrainConfig, curriculum: CurriculumConfig | None) -> str | None:
    """Names what makes a step depend on the number of steps to come; None where nothing does."""
    if train.lr_schedule != "constant" or train.warmup_fraction > 0:
        return f"a {train.lr_schedule} schedule"
    if curriculum is not None and curriculum.schedule != "sort":
        return f"a {curriculum.schedule} curriculum"
    return None


def check_resume(saved: Config, new: Config) -> None:
    """Raises ConfigError, with the key and both values, where `new` does not continue `saved`."""
    old_flat, new_flat = _flat(to_plain(saved)), _flat(to_plain(new))
    for key in [*old_flat, *(key for key in new_flat if key not in old_flat)]:
        old, now = old_flat.get(key, _MISSING), new_flat.get(key, _MISSING)
        if old == now or is_under(key, (*FREE, *BUDGET)) or _is_free_reward(key, new):
            continue
        if key == "search.trials" and isinstance(old, int) and isinstance(now, int) and now > old:
            continue
        raise _differs(key, old, now, "is what a resume must keep")
    _check_budget(saved, new, old_flat, new_flat)


def _is_free_reward(key: str, config: Config) -> bool:
    """Whether a key of `rewards` changes no weight of such a run."""
    first, _, last = key.partition(".")
    if first != "rewards":
        return False
    used = OBJECTIVES[config.train.objective].rollouts
    return not used or last.rpartition(".")[2] in FREE_OF_REWARDS


def _check_budget(
    saved: Config, new: Config, old_flat: dict[str, Any], new_flat: dict[str, Any]
) -> None:
    before, after = _budget(saved.train), _budget(new.train)
    if before == after:
        return
    key = next(key for key in reversed(BUDGET) if old_flat[key] != new_flat[key])
    if old_flat.get("search") is not None or "search.trials" in old_flat:
        rule = "cannot change in a sweep, whose trials are compared at one budget"
        raise _differs(key, old_flat[key], new_flat[key], rule)
    if depends := depends_on_horizon(new.train, new.data.curriculum):
        raise _differs(key, old_flat[key], new_flat[key], f"cannot change under {depends}")
    if any(now < old for old, now in zip(before, after, strict=True)):
        raise _differs(key, old_flat[key], new_flat[key], "may only be raised")


def _budget(train: TrainConfig) -> tuple[float, float]:
    """Epochs and examples, infinite where unlimited; neither written is one epoch."""
    if train.epochs is None and train.max_examples is None:
        return 1.0, math.inf
    epochs = math.inf if train.epochs is None else train.epochs
    return epochs, math.inf if train.max_examples is None else float(train.max_examples)


def _differs(key: str, old: Any, now: Any, rule: str) -> ConfigError:
    shown = [("nothing" if value is _MISSING else shown_value(value)) for value in (old, now)]
    return ConfigError(
        f"{key}={shown[1]} (the run has {shown[0]})", rule, "write the run's value or another name"
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values; lists and empty mappings are values, lists of sections are not."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    if isinstance(value, str):
        value = _UNPACKED.sub("", value)
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}.{key}" if prefix else key))
    return flat
