"""When a sweep stops its trials: by a signal, or by its budget; no cluster."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from raytune_ft.config.search import BudgetConfig
from raytune_ft.ray_backend.sweep import StopAtBudget, StopWith
from raytune_ft.search.results import Spending
from tests.unit.ray_backend.test_trial import Somewhere


def test_tune_hears_of_the_end_when_no_trial_holds_workers() -> None:
    interrupted, execution = threading.Event(), Somewhere()
    stop = StopWith(interrupted, execution, grace_s=1000)
    assert not stop.stop_all()
    assert not execution.stopping
    interrupted.set()
    assert not stop.stop_all()
    assert execution.stopping
    execution.runs.clear()
    assert stop.stop_all()


def test_tune_hears_of_the_end_when_the_grace_has_passed() -> None:
    interrupted, now = threading.Event(), [100.0]
    stop = StopWith(interrupted, Somewhere(), grace_s=30, clock=lambda: now[0])
    interrupted.set()
    for now[0], over in [(100.0, False), (129.0, False), (131.0, True)]:
        assert stop.stop_all() is over


def test_running_trials_stop_at_their_next_report() -> None:
    kept: list[int] = []
    budget = BudgetConfig(examples=300)
    stop = StopAtBudget(Spending(budget, {"a": 100}, 0.0, 2.0, lambda: 0.0), lambda: kept.append(1))
    for name in "ab":
        trial = SimpleNamespace(trial_id=f"tune-{name}", config={"trial": name})
        stop.on_trial_start(0, [], trial)
    assert not stop("tune-a", {"examples": 200})
    assert stop("tune-b", {"examples": 100})
    assert stop("tune-a", {"examples": 200})
    assert not stop("tune-a", {"examples": 200, "done": True, "outcome": "completed"})
    assert not stop.stop_all()
    assert len(kept) == 4
