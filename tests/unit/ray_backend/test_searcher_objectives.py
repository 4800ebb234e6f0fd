"""Several metrics at once: what Optuna is told, and the trials that no other one beats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.search import SearchConfig
from raytune_ft.ray_backend.searcher import StudySearcher
from raytune_ft.search.study import open_study, pareto, reports, rows

METRICS = ["eval_loss", "eval_token_accuracy"]
SPACE = {"train.lr": {"log_uniform": [1e-5, 1e-1]}, "method.rank": {"choice": [2, 4]}}


def begin(tmp_path: Path, **changes: Any) -> tuple[SearchConfig, StudySearcher]:
    search = SearchConfig.model_validate({"metric": METRICS, "space": SPACE, **changes})
    study = open_study("s", tmp_path, search, True)
    return search, StudySearcher(study, search, 0, lambda name, params: 100)


def end(one: StudySearcher, trial: str, loss: float, accuracy: float) -> None:
    report = {"examples": 50, "eval_loss": loss + 1, "eval_token_accuracy": accuracy}
    one.on_trial_result(trial, report)
    done = {"outcome": "completed", "values": [loss, accuracy], "best_eval_loss": loss}
    one.on_trial_complete(trial, {**done, "examples": 100})


def test_the_front_is_of_completed_trials_that_nobody_beats(tmp_path: Path) -> None:
    search, one = begin(tmp_path)
    for name in "abcd":
        one.suggest(name)
    end(one, "a", 1.0, 0.5)
    end(one, "b", 2.0, 0.9)
    end(one, "c", 2.0, 0.4)
    one.on_trial_result("d", {"examples": 30, "eval_loss": 0.5, "eval_token_accuracy": 0.99})
    one.on_trial_complete("d", {"examples": 60, "eval_loss": 0.4, "eval_token_accuracy": 0.99})
    study = open_study("s", tmp_path, search, True)
    assert pareto(study) == ("trial-000", "trial-001")
    found = rows(study, search)
    assert [row.status for row in found] == ["completed"] * 3 + ["pruned"]
    assert [(row.value, row.eval_loss) for row in found] == [(1, 1), (2, 2), (2, 2), (0.4, 0.4)]
    assert found[1].values == {"eval_loss": 2.0, "eval_token_accuracy": 0.9}
    assert reports(study.trials[3]) == {30: 0.5, 60: 0.4}


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_a_seed_draws_the_same_trials_again(tmp_path: Path, sampler: str) -> None:
    draws = []
    for name in "xy":
        (tmp_path / name).mkdir()
        _, one = begin(tmp_path / name, sampler=sampler, trials=8)
        drawn = []
        for index in range(8):
            config = one.suggest(str(index))
            assert isinstance(config, dict)
            drawn.append(config["params"])
            end(one, str(index), config["params"]["train.lr"], 1 / config["params"]["method.rank"])
        draws.append(drawn)
    assert draws[0] == draws[1]


def test_one_metric_has_no_front(tmp_path: Path) -> None:
    search, _ = begin(tmp_path, metric="eval_loss")
    assert pareto(open_study("s", tmp_path, search, True)) is None
