"""How one optimizer step is spread over processes: one file a strategy, one contract for all."""

from __future__ import annotations

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.config.strategies import STRATEGIES
from raytune_ft.model.load import Precision
from raytune_ft.strategy.base import MOMENTS, OptimizerOf, Strategy
from raytune_ft.strategy.numerics import be_deterministic

__all__ = ["MOMENTS", "OptimizerOf", "Strategy", "build_strategy", "strategy_class"]


def strategy_class(name: str) -> type[Strategy]:
    """The class of a strategy by its name."""
    found: type[Strategy] = STRATEGIES[name].implementation()
    return found


def build_strategy(
    name: str, parallel: ParallelConfig, precision: Precision, deterministic: bool = False
) -> Strategy:
    """This process's part of a strategy; those of several processes need a process group.

    `deterministic`: see `numerics.be_deterministic`.
    """
    be_deterministic(deterministic)
    return strategy_class(name)(parallel, precision)
