"""How one optimizer step is spread over processes: one file a strategy, one contract for all."""

from __future__ import annotations

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.config.strategies import STRATEGIES
from raytune_ft.model.load import Precision
from raytune_ft.strategy.base import MOMENTS, OptimizerOf, Strategy

__all__ = ["MOMENTS", "OptimizerOf", "Strategy", "build_strategy", "strategy_class"]


def strategy_class(name: str) -> type[Strategy]:
    """The class of a strategy by its name."""
    found: type[Strategy] = STRATEGIES[name].implementation()
    return found


def build_strategy(name: str, parallel: ParallelConfig, precision: Precision) -> Strategy:
    """This process's part of a strategy; those of several processes need a process group."""
    return strategy_class(name)(parallel, precision)
