"""The search space: lines of the config as Optuna distributions, drawn values as the file has them.

Imports no ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from raytune_ft.config.search import Distribution

SCALARS = (bool, int, float, str, type(None))


def distributions(space: Mapping[str, Distribution]) -> dict[str, BaseDistribution]:
    """Optuna's side of every line."""
    return {key: _distribution(line) for key, line in space.items()}


def encode(space: Mapping[str, Distribution], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as Optuna stores them."""
    return {
        key: _encode(value) if space[key].kind == "choice" else value
        for key, value in values.items()
    }


def decode(space: Mapping[str, Distribution], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The values that Optuna drew, as the config file would have them."""
    return {key: _decode(space[key], value) for key, value in drawn.items()}


def _distribution(line: Distribution) -> BaseDistribution:
    values = line.values
    match line.kind:
        case "uniform":
            return FloatDistribution(float(values[0]), float(values[1]))
        case "log_uniform":
            return FloatDistribution(float(values[0]), float(values[1]), log=True)
        case "int_uniform":
            return IntDistribution(int(values[0]), int(values[1]))
        case "choice":
            return CategoricalDistribution([_encode(value) for value in values])
        case other:
            raise AssertionError(f"no distribution for {other}")


def _encode(value: Any) -> Any:
    """Optuna stores scalars; anything else is stored as its JSON."""
    return value if isinstance(value, SCALARS) else json.dumps(value, sort_keys=True)


def _decode(line: Distribution, value: Any) -> Any:
    if line.kind != "choice":
        return value
    return next(
        each for each in line.values if (type(_encode(each)), _encode(each)) == (type(value), value)
    )
