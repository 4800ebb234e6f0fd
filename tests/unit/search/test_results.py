"""Ranking and status of a sweep."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raytune_ft.records import TrialRecord, TrialStatus, to_json
from raytune_ft.search.results import ranking, sweep_result


def row(
    number: int, status: TrialStatus, value: float | None, error: str | None = None
) -> TrialRecord:
    params: dict[str, Any] = {"train.lr": 10.0**-number}
    return TrialRecord(f"trial-{number:03d}", params, status, value, 100, 1.0, error, value)


def test_the_lowest_usable_value_is_the_best() -> None:
    trials = [
        row(0, "completed", 2.0),
        row(1, "failed", 0.1, "Diverged"),
        row(2, "early_stopped", 1.5),
        row(3, "pruned", 1.9),
        row(4, "interrupted", 0.2),
        row(5, "completed", float("nan")),
        row(6, "completed", 1.5),
    ]
    assert [trial.id[-1] for trial in ranking(trials, "min")] == ["2", "6", "3", "0"]
    assert [trial.id[-1] for trial in ranking(trials, "max")] == ["0", "3", "2", "6"]
    result = sweep_result(
        trials, {"eval_loss": 3.0}, 9.0, interrupted=False, mode="min", execution="packed"
    )
    assert result.status == "completed"
    assert result.best == {
        "trial": "trial-002", "params": {"train.lr": 0.01}, "eval_loss": 1.5
    }  # fmt: skip


def test_a_sweep_without_a_usable_trial_failed_and_says_why() -> None:
    trials = [row(1, "failed", None, "Diverged: step 3"), row(0, "failed", None, "OutOfMemory")]
    result = sweep_result(trials, None, 1.0, interrupted=False, mode="min", execution="packed")
    assert (result.status, result.best) == ("failed", None)
    assert result.error == "none of 2 trials is usable: Diverged: step 3"
    assert [trial.id for trial in result.trials] == ["trial-000", "trial-001"]


@pytest.mark.parametrize("trials", [[], [row(0, "completed", 1.0)]])
def test_an_interrupted_sweep_says_so(trials: list[TrialRecord]) -> None:
    assert sweep_result(trials, None, 1.0, True, "min", "packed").status == "interrupted"


def test_the_file_has_the_keys_of_the_contract() -> None:
    result = sweep_result(
        [row(0, "completed", 1.0)], {"eval_loss": 2.0}, 3.0, False, "min", "isolated"
    )
    written = json.loads(to_json(result))
    assert {"status", "base", "best", "trials", "makespan_s", "execution"} <= written.keys()
    keys = {"id", "params", "status", "eval_loss", "examples", "wall_s"}
    assert keys <= written["trials"][0].keys()
