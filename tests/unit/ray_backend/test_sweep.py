"""When a sweep stops its trials: by a signal, or by its budget; how large it is; no cluster."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.execution import class_cache

from raytune_ft.config.search import BudgetConfig
from raytune_ft.ray_backend.capacity import Demand
from raytune_ft.ray_backend.sweep import (
    Growth,
    StopAtBudget,
    StopWith,
    points_for,
    settings_of_tune,
)
from raytune_ft.search.results import Spending
from tests.support.models import save_tiny_encoder
from tests.support.runs import make_config
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


class Kept:
    """Worker groups with room for two trials each."""

    trials_each = 2

    def __init__(self) -> None:
        self.count = 0

    def keep(self, count: int, room: int) -> None:
        self.count = count
        assert count <= room

    def held(self) -> int:
        return self.count


@pytest.mark.parametrize(
    ("written", "left", "cpus", "kept", "at_once", "asked"),
    [
        ("auto", 9, 1, 1, 2, 5),  # five groups are of use
        ("auto", 9, 3, 3, 6, 5),
        ("auto", 9, 8, 5, 9, 5),
        ("auto", 3, 8, 2, 3, 2),  # the tail
        ("auto", 0, 8, 0, 1, 0),
        (4, 9, 8, 2, 4, 2),
        ("auto", 9, 0, 1, 2, 5),  # the last node is gone, and may return
    ],
)
def test_a_sweep_is_as_large_as_its_cluster(
    written: int | str,
    left: int,
    cpus: int,
    kept: int,
    at_once: int,
    asked: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    demands: list[int] = []
    monkeypatch.setattr("raytune_ft.ray_backend.sweep.autoscaler_runs", lambda: True)
    monkeypatch.setattr(Demand, "ask", lambda self, groups: demands.append(groups))
    space = {"train.lr": {"uniform": [0, 1]}}
    changes = {"search": {"max_concurrent": written, "space": space}}
    config = make_config(tmp_path, tmp_path / "rows.jsonl", changes)
    searcher: Any = SimpleNamespace(left=left, at_once=0)
    nodes = [{"CPU": 1.0}] * cpus
    places = Kept()
    demand = Demand(config.parallel)
    Growth(config, places, searcher, demand, print, lambda parallel: nodes).look()  # type: ignore[arg-type]
    assert (places.count, searcher.at_once, demands) == (kept, at_once, [asked])


def test_keys_of_aws_are_not_handed_to_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish")
    with settings_of_tune():
        actor = class_cache._ActorClassCache().get(type("Trial", (), {}))
    assert "swordfish" not in str(actor._default_options)
    after = class_cache._ActorClassCache().get(type("Trial", (), {}))
    assert "swordfish" in str(after._default_options)  # as Tune does it


def test_an_encoder_that_classifies_is_searched(tmp_path: Path) -> None:
    changes = {
        "data.train.format": "classification",
        "train.objective": "classification",
        "search": {"trials": 2, "space": {"train.lr": {"log_uniform": [1e-5, 1e-2]}}},
    }
    config = make_config(save_tiny_encoder(tmp_path / "encoder"), tmp_path / "rows.jsonl", changes)
    assert points_for(config)
