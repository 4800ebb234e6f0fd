"""What a sweep may spend, and what happens when it has."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.config.search import BudgetConfig
from raytune_ft.search.results import Spending


def spending(clock: list[float], gpu_s: float = 0.0, **budget: Any) -> Spending:
    config = BudgetConfig.model_validate(budget) if budget else None
    return Spending(config, {"a": 100}, gpu_s, 2.0, lambda: clock[0])


def test_whatever_is_used_up_first_ends_it() -> None:
    clock = [0.0]
    spent = spending(clock, examples=300, wall_s="1m", gpu_hours=0.05)
    assert spent.over() is None
    spent.trained("b", 150)
    spent.trained("b", 140)  # it goes on from a checkpoint and reports once more
    spent.trained("a", 149)
    assert spent.over() is None
    spent.trained("a", 150)
    assert spent.over() == "examples"

    spent = spending(clock, wall_s="1m", gpu_hours=0.05)
    spent.began("a")
    clock[0] = 59.0
    assert spent.over() is None
    clock[0] = 60.0
    assert spent.over() == "wall_s"

    spent = spending(clock, gpu_s=100.0, gpu_hours=0.05)  # of 180 s, 80 are left
    spent.began("a")
    clock[0] += 20
    spent.ended("a")
    spent.began("b")
    clock[0] += 10
    assert (spent.gpu_s, spent.over()) == (160.0, None)
    clock[0] += 10
    assert (spent.gpu_s, spent.over()) == (180.0, "gpu_hours")


def test_no_budget_is_never_used_up() -> None:
    spent = spending([1e12])
    spent.trained("a", 10**12)
    assert spent.over() is None


@pytest.mark.parametrize(
    ("written", "seconds"), [(90, 90.0), ("90s", 90.0), ("1.5h", 5400.0), ("2d", 172800.0)]
)
def test_time_is_written_as_people_do(written: float | str, seconds: float) -> None:
    clock = [seconds - 1]
    spent = spending(clock, wall_s=written)
    assert spent.over() is None
    clock[0] += 1
    assert spent.over() == "wall_s"
