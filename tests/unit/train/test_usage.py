"""`peak_gib` and `mfu` of a run's steps: on GPUs, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.data.prepare import prepare_data
from raytune_ft.layout import FORECAST, METRICS
from raytune_ft.model.load import load_tokenizer
from raytune_ft.records import Forecast, StepMetrics, plain_of
from raytune_ft.report import tables
from raytune_ft.report.collect import Trial
from raytune_ft.report.terminal import LineReporter
from raytune_ft.rundir import RunSpec
from raytune_ft.train.report import Silent
from raytune_ft.train.run import run_training
from raytune_ft.train.usage import Usage
from tests.support.runs import make_config, make_inputs

FORECAST_8B = Forecast(flops_a_token=4e10, peak_flops=1e15, peak_gib=60.5, tokens_per_s=45_000.0)
STEP = StepMetrics(7, 28, 100, 60, 1.5, 1e-3, 0.1, 40_000.0, 9.0)


def usage(device: str, workers: int = 4, forecast: Forecast | None = FORECAST_8B) -> Usage:
    return Usage(torch.device(device), workers, forecast)


def test_the_share_of_the_peak_is_that_of_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**29)
    found = usage("cuda")
    assert found.peak_gib == 2.5
    assert found.mfu(40_000.0) == 40_000 * 4e10 / (4 * 1e15) == 0.4
    for forecast in (None, Forecast(4e10)):  # no data sheet
        assert usage("cuda", forecast=forecast).mfu(40_000.0) is None
        assert usage("cuda", forecast=forecast).peak_gib == 2.5


def test_a_cpu_has_neither_and_a_file_no_key_for_them() -> None:
    assert (usage("cpu").peak_gib, usage("cpu").mfu(40_000.0)) == (None, None)
    assert list(plain_of(STEP))[-1] == "wall_s"
    on_gpu = StepMetrics(**(STEP.plain | {"peak_gib": 2.5}))
    assert plain_of(on_gpu) == STEP.plain | {"peak_gib": 2.5}


def test_steps_and_the_forecast_of_a_run_are_in_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Usage, "peak_gib", 2.5)
    monkeypatch.setattr(Usage, "mfu", lambda self, tokens_per_s: 0.25)
    config = make_config(*make_inputs(tmp_path / "inputs"), {"train.max_examples": 14})
    data = prepare_data(config.data, load_tokenizer(config.model), 0, tmp_path / "cache")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_training(RunSpec(config, run_dir, data.path, forecast=FORECAST_8B), "single", Silent())
    lines = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert steps
    assert {(line["peak_gib"], line["mfu"]) for line in steps} == {(2.5, 0.25)}
    assert json.loads((run_dir / FORECAST).read_text()) == vars(FORECAST_8B)


def trial(name: str, steps: list[dict[str, Any]], forecast: dict[str, Any] | None) -> Trial:
    return Trial(name, {}, "completed", 1.0, 28, 9.0, None, steps, [], None, forecast)


def test_the_table_has_what_was_measured_beside_what_was_expected() -> None:
    speeds = ((10.0, 0.1), (40_000.0, 0.41), (41_000.0, 0.42))
    steps = [
        STEP.plain | {"tokens_per_s": speed, "mfu": share, "peak_gib": 58.0 + share}
        for speed, share in speeds
    ]
    unknown = [STEP.plain | {"peak_gib": 20.0}]
    runs = [
        trial("a", steps, dict(vars(FORECAST_8B))),
        trial("b", unknown, {"flops_a_token": 1.0, "peak_gib": None}),
        trial("on a CPU", [STEP.plain], None),
        trial("not begun", [], None),
    ]
    table = tables.usage(runs)
    assert table is not None
    assert table.rows == (
        ("a", "40,000", "45,000", "41.0%", "58.4", "60.5"),
        ("b", "40,000", "-", "-", "20.0", "-"),
    )
    assert tables.usage(runs[2:]) is None


def test_the_log_shows_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.report.terminal.LOG_EVERY_S", 0.0)
    LineReporter(56).step(StepMetrics(**(STEP.plain | {"peak_gib": 58.04, "mfu": 0.412})))
    LineReporter(56).step(STEP)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("40,000 tokens/s  41% of peak  58.0 GiB")
    assert second.endswith("40,000 tokens/s")
