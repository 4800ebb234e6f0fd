"""A trial's name and config. Imports no Optuna, which every trial's process would wait for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_ft.config.load import apply_overrides
from raytune_ft.config.schema import Config


def apply_params(config: Config, params: Mapping[str, Any], trial: str, storage: str) -> Config:
    """The config of one trial: a run called `trial` in `storage`, without a search of its own.

    Raises:
        ConfigError: the values are each right and wrong together.
    """
    own = config.model_copy(update={"search": None, "name": trial, "storage": storage})
    return apply_overrides(own, params)


def trial_name(number: int) -> str:
    """`trial-007`, by Optuna's number of the trial."""
    return f"trial-{number:03d}"
