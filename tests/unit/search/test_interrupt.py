"""What an interrupted sweep tells Tune and its trials, and when; no cluster."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ft.search import ray_events, ray_trial
from raytune_ft.search.ray_events import StopWith
from raytune_ft.search.ray_trial import IsolatedTrial


class Board:
    """A switchboard without an actor: what is called is answered at once."""

    def __init__(self, stopping: bool = False) -> None:
        self.runs: list[str] = ["run-a"]
        self.stopping = stopping

    def __getattr__(self, name: str) -> Any:
        answers = {
            "stop_everybody": lambda: setattr(self, "stopping", True),
            "open_runs": lambda: list(self.runs),
            "is_stopping": lambda: self.stopping,
        }
        return SimpleNamespace(remote=answers[name])


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ray_events, ray_trial):
        monkeypatch.setattr(module, "ray", SimpleNamespace(get=lambda answer: answer))


def test_tune_hears_of_the_end_when_no_trial_holds_workers() -> None:
    interrupted, board = threading.Event(), Board()
    stop = StopWith(interrupted, board, grace_s=1000)
    assert not stop.stop_all()
    assert not board.stopping
    interrupted.set()
    assert not stop.stop_all()
    assert board.stopping
    board.runs.clear()
    assert stop.stop_all()


def test_tune_hears_of_the_end_when_the_grace_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, now = threading.Event(), [100.0]
    monkeypatch.setattr(ray_events, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stop = StopWith(interrupted, Board(), grace_s=30)
    interrupted.set()
    for now[0], over in [(100.0, False), (129.0, False), (131.0, True)]:
        assert stop.stop_all() is over


@pytest.mark.parametrize("stopping", [False, True])
def test_a_trial_that_tune_stops_saves_where_the_sweep_stops(
    stopping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(ray_trial, "write_ended", lambda spec, status: done.append(status))
    trial = IsolatedTrial.__new__(IsolatedTrial)
    trial._shared = SimpleNamespace(switchboard=Board(stopping))  # type: ignore[assignment]
    trial._spec, trial._over = Path(), False  # type: ignore[assignment]
    trial._job = SimpleNamespace(  # type: ignore[assignment]
        wind_down=lambda grace_s: done.append("saved"), stop=lambda: done.append("stopped")
    )
    trial.cleanup()
    assert done == (["saved", "stopped"] if stopping else ["stopped", "pruned"])
