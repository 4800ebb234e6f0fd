"""What an interrupted sweep tells Tune and its trials, and when; no cluster."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ft.config.search import BudgetConfig
from raytune_ft.ray_backend import sweep
from raytune_ft.ray_backend import trial as ray_trial
from raytune_ft.ray_backend.sweep import StopAtBudget, StopWith
from raytune_ft.ray_backend.trial import SweepTrial
from raytune_ft.search.results import Spending


class Somewhere:
    """A place without a cluster."""

    def __init__(self, stopping: bool = False) -> None:
        self.runs: list[str] = ["run-a"]
        self.stopping = stopping

    def stop_everybody(self) -> None:
        self.stopping = True

    def open_runs(self) -> list[str]:
        return list(self.runs)

    def is_stopping(self) -> bool:
        return self.stopping

    def job(self, spec: Any) -> Any: ...

    def give_up(self, trial: str) -> None: ...


def test_tune_hears_of_the_end_when_no_trial_holds_workers() -> None:
    interrupted, place = threading.Event(), Somewhere()
    stop = StopWith(interrupted, place, grace_s=1000)
    assert not stop.stop_all()
    assert not place.stopping
    interrupted.set()
    assert not stop.stop_all()
    assert place.stopping
    place.runs.clear()
    assert stop.stop_all()


def test_tune_hears_of_the_end_when_the_grace_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, now = threading.Event(), [100.0]
    monkeypatch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stop = StopWith(interrupted, Somewhere(), grace_s=30)
    interrupted.set()
    for now[0], over in [(100.0, False), (129.0, False), (131.0, True)]:
        assert stop.stop_all() is over


@pytest.mark.parametrize("stopping", [False, True])
def test_a_trial_that_tune_stops_saves_where_the_sweep_stops(
    stopping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(ray_trial, "write_ended", lambda spec, status: done.append(status))
    trial = SweepTrial.__new__(SweepTrial)
    trial._place = Somewhere(stopping)
    trial._spec, trial._over = Path(), False  # type: ignore[assignment]
    trial._job = SimpleNamespace(  # type: ignore[assignment]
        wind_down=lambda grace_s: done.append("saved"), stop=lambda: done.append("stopped")
    )
    trial.cleanup()
    assert done == (["saved", "stopped"] if stopping else ["stopped", "pruned"])


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
