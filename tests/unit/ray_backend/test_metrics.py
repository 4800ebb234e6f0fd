"""Which figures a driver shows, and under which names; Ray's gauges are written down."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.layout import CHECKPOINTS, MANIFEST, MIRROR_OWNER, TRIALS, step_name
from raytune_ft.ray_backend import metrics
from raytune_ft.ray_backend.metrics import DriverGauges, RunGauges, names_of
from raytune_ft.records import EvalMetrics, StepMetrics

Values = dict[tuple[str, ...], float]


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Values:
    """By the name of the gauge and the values of its tags."""
    found: Values = {}

    class Gauge:
        def __init__(self, name: str, about: str, keys: tuple[str, ...]) -> None:
            self.name, self.keys, self.tags = name, keys, dict[str, str]()

        def set_default_tags(self, tags: dict[str, str]) -> Any:
            self.tags = tags
            return self

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            every = self.tags | (tags or {})
            assert tuple(every) == self.keys
            found[(self.name, *every.values())] = value

    monkeypatch.setattr(metrics, "Gauge", Gauge)
    return found


def test_a_trial_is_named_with_its_sweep() -> None:
    assert names_of(Path("/runs/gsm8k")) == {"run": "gsm8k", "trial": ""}
    trial = Path("/runs/gsm8k/trials/trial-003")
    assert names_of(trial) == {"run": "gsm8k", "trial": "trial-003"}


def test_steps_and_evaluations(values: Values) -> None:
    gauges = RunGauges(Path("/runs/one"))
    gauges.step(StepMetrics(7, 28, 100, 60, 1.5, 1e-3, 0.1, 200.0, 9.0))
    gauges.evaluation(EvalMetrics(7, 28, {"eval_loss": 1.25}), None)
    figures = {name.removeprefix("raytune_ft_"): value for (name, *_), value in values.items()}
    assert figures == {
        "step": 7,
        "examples": 28,
        "loss": 1.5,
        "tokens_per_s": 200.0,
        "step_time_s": 0.5,
        "eval_loss": 1.25,
    }


def checkpoint(run_dir: Path, step: int, age_s: float) -> None:
    manifest = run_dir / CHECKPOINTS / step_name(step) / MANIFEST
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    os.utime(manifest, (time.time() - age_s,) * 2)


def test_ages_of_a_run(values: Values, tmp_path: Path) -> None:
    gauges = DriverGauges(tmp_path / "one")
    gauges.measure()
    assert values == {}  # nothing is there yet
    checkpoint(tmp_path / "one", 10, 100)
    checkpoint(tmp_path / "one", 20, 40)
    (tmp_path / "one" / MIRROR_OWNER).touch()
    gauges.measure()
    assert values["raytune_ft_checkpoint_age_s", "one", ""] == pytest.approx(40, abs=5)
    assert values["raytune_ft_mirror_lag_s", "one"] == pytest.approx(0, abs=5)


def test_trials_are_counted_by_state(values: Values, tmp_path: Path) -> None:
    gauges = DriverGauges(tmp_path / "search")
    for name in ("a", "b", "c"):
        gauges.started(name)
    gauges.ended("a", "pruned")
    gauges.ended("b", "completed")
    gauges.started("d")
    checkpoint(tmp_path / "search" / TRIALS / "a", 1, 10)
    checkpoint(tmp_path / "search" / TRIALS / "c", 1, 10)
    gauges.measure()
    counts = {tags[-1]: value for (name, *tags), value in values.items() if name.endswith("trials")}
    assert counts == {"running": 2, "pruned": 1, "completed": 1}
    ages = [tags for (name, *tags) in values if name.endswith("checkpoint_age_s")]
    assert ages == [["search", "c"]]  # of those that run
