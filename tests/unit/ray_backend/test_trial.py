"""How the run of a trial ends; no cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2._internal.state.schema import _to_json_serializable_value

from raytune_ft.config.identity import config_sha256
from raytune_ft.ray_backend.registry import Ended, Report
from raytune_ft.ray_backend.trial import Shared, TrialRun, spec_of
from raytune_ft.records import EvalMetrics, Forecast
from raytune_ft.rundir import Layout, RunSpec
from raytune_ft.train.result import load_result
from tests.support.runs import make_config

METRICS = EvalMetrics(1, 7, {"eval_loss": 1.0, "eval_token_accuracy": 0.5})


class Somewhere:
    """A place without a cluster; its runs report once and then train on."""

    def __init__(self, stopping: bool = False) -> None:
        self.runs: list[str] = ["run-a"]
        self.stopping = stopping
        self.done: list[str] = []

    def stop_all(self) -> None:
        self.stopping = True

    def open_runs(self) -> list[str]:
        return list(self.runs)

    def is_stopping(self) -> bool:
        return self.stopping

    def handle(self, spec: Any) -> Any:
        return self

    def give_up(self, trial: str) -> None: ...

    def release(self, handle: Any, again: bool) -> None:
        if handle is not None:
            self.done.append("passed on" if again else "stopped")

    def start(self) -> None:
        self.done.append("started")

    def next(self, timeout_s: float = 1.0) -> Report | Ended | None:
        return Report(METRICS, None)

    def wind_down(self, grace_s: float) -> None:
        self.done.append("saved")

    def stop(self) -> None: ...


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("stopping", [False, True])
def test_a_trial_that_tune_stops_saves_where_the_sweep_stops(
    stopping: bool, again: bool, tmp_path: Path
) -> None:
    spec = RunSpec(make_config(tmp_path, tmp_path / "rows.jsonl"), tmp_path, tmp_path)
    now = [100.0]
    execution = Somewhere(stopping)
    trial = TrialRun(spec, ["eval_loss"], execution, clock=lambda: now[0])
    now[0] += 2.5
    report = trial.step()
    assert (report["eval_loss"], report["wall_s"]) == (1.0, 2.5)
    trial.end(again=again)
    trial.end()  # the second time, nothing is left to end
    result = load_result(tmp_path)
    if stopping:
        assert execution.done == ["started", "saved", "stopped"]
        assert result is None  # the next driver continues it
    else:
        assert execution.done == ["started", "passed on" if again else "stopped"]
        assert result is not None
        assert result.status == "pruned"


def test_a_trial_has_the_values_of_its_secrets_and_ray_only_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "tracking.uri": "http://me:${CANARY}@host",
        "search": {"space": {"method.targets": {"choice": [["${CANARY}_proj"], "all-linear"]}}},
    }
    monkeypatch.delenv("CANARY", raising=False)  # the process of a trial may lack it
    config = make_config(tmp_path, tmp_path / "rows.jsonl", changes)
    references = {"CANARY": "swordfish"}
    shared = Shared(config, tmp_path, tmp_path, "eval_loss", "min", {}, references)
    spec = spec_of(shared, "trial-000", {"method.targets": ["${CANARY}_proj"]})
    assert spec.config.tracking.uri == "http://me:swordfish@host"
    assert spec.config.method.targets == ["swordfish_proj"]
    told = [repr(shared), repr(spec), _to_json_serializable_value({"spec": spec, "n": 1})]
    assert "swordfish" not in repr(told)
    assert "trial-000" in repr(told[2])  # what Ray Train keeps is the text of the spec


def test_a_trial_gets_the_layout_of_its_method(tmp_path: Path) -> None:
    """Not where its own config says otherwise; and it remains the same experiment."""
    forecast = Forecast(1e9)
    layouts = {"lora": Layout(4096, "full", forecast), "full": Layout(1024, "selective")}
    rows = tmp_path / "rows.jsonl"
    space = {"train.lr": {"choice": [1e-3, 1e-4]}}
    config = make_config(tmp_path, rows, {"search": {"space": space}})
    shared = Shared(config, tmp_path, tmp_path, "eval_loss", "min", {}, {}, layouts)
    spec = spec_of(shared, "trial-000", {"train.lr": 1e-4})
    found = (spec.config.train.micro_tokens, spec.config.parallel.activation_checkpointing)
    assert found == (4096, "full")
    assert spec.forecast is forecast
    plain = spec_of(replace(shared, layouts={}), "trial-000", {"train.lr": 1e-4})
    assert plain.config.train.micro_tokens == "auto"
    assert config_sha256(plain.config) == config_sha256(spec.config)
    own = spec_of(shared, "trial-001", {"train.micro_tokens": 99})
    assert (own.config.train.micro_tokens, own.forecast) == (99, forecast)
    other = spec_of(shared, "trial-002", {"method.name": "full"})
    assert other.config.train.micro_tokens == 1024
    assert other.config.parallel.activation_checkpointing == "selective"
