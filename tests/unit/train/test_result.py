"""How a run ended, and whose word counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from raytune_ft.errors import ConfigError, Diverged, OutOfMemory, RunFailed
from raytune_ft.rundir import RunSpec
from raytune_ft.train.result import end_run, failed_result, left_by_workers, load_result
from tests.support.runs import make_config


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step-000002").mkdir(parents=True)
    numbers = {"eval_token_accuracy": 0.5, "eval_exact_match": 0.0}
    lines = [
        {"step": 0, "examples": 0, "eval_loss": 3.0, **numbers},
        {"step": 1, "examples": 7, "loss": 2.5},
        {"step": 2, "examples": 14, "eval_loss": 2.0, **numbers},
        {"step": 3, "examples": 21, "eval_loss": 1.0, **numbers},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "exam'
    (run_dir / "metrics.jsonl").write_text(text)
    return RunSpec(make_config(tmp_path, tmp_path / "rows.jsonl"), run_dir, tmp_path)


def test_a_pruned_run_has_its_best_saved_evaluation(spec: RunSpec) -> None:
    result = end_run(spec, "pruned")
    assert load_result(spec.run_dir) == result
    assert result.base is not None
    assert result.base["eval_loss"] == 3.0
    assert result.best is not None
    assert (result.best.eval_loss, result.best.checkpoint) == (2.0, "checkpoints/step-000002")
    assert result.final is not None
    assert (result.final.examples, result.final.checkpoint) == (21, None)


def test_workers_that_die_for_good_leave_a_failed_result(spec: RunSpec) -> None:
    with pytest.raises(OutOfMemory, match="too much"):
        left_by_workers(spec, OutOfMemory("too much"))
    result = load_result(spec.run_dir)
    assert result is not None
    assert (result.status, result.error) == ("failed", "OutOfMemory: too much")


def test_a_run_that_says_nothing_failed(spec: RunSpec) -> None:
    with pytest.raises(RunFailed, match="without a result"):
        left_by_workers(spec, None)


def test_what_the_workers_wrote_is_believed(spec: RunSpec) -> None:
    written = end_run(spec, failed_result(spec, Diverged("step 9")))
    assert left_by_workers(spec, RunFailed("a worker died")) == written


def test_a_wrong_input_is_raised_as_such(spec: RunSpec) -> None:
    written = end_run(spec, failed_result(spec, "ConfigError: x is wrong; write y"))
    with pytest.raises(ConfigError, match="x is wrong; write y"):
        left_by_workers(spec, ConfigError("x", "is wrong", "write y"))
    assert load_result(spec.run_dir) == written


def test_who_started_a_run_says_how_it_ended_only_where_the_run_did_not(spec: RunSpec) -> None:
    assert end_run(spec, "interrupted").status == "interrupted"
    own = replace(failed_result(spec, None), status="completed")
    assert end_run(spec, own) == own
    for late in ("interrupted", "failed"):
        assert end_run(spec, late, "the driver was asked to stop") == own
    assert load_result(spec.run_dir) == own


def test_the_search_decides_over_the_run(spec: RunSpec) -> None:
    end_run(spec, replace(failed_result(spec, None), status="completed"))
    assert end_run(spec, "pruned").status == "pruned"
    assert end_run(spec, failed_result(spec, "the trial's process died")).status == "failed"
