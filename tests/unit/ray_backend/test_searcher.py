"""What Optuna is asked and told, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from raytune_ft.config.search import SearchConfig
from raytune_ft.errors import ConfigError, StorageError
from raytune_ft.ray_backend.searcher import StudySearcher
from raytune_ft.search.sampler import JointSampler
from raytune_ft.search.space import distributions
from raytune_ft.search.study import open_study, rows, unfinished


def search_config(**changes: Any) -> SearchConfig:
    space = {
        "train.lr": {"log_uniform": [1e-5, 1e-1]},
        "method.rank": {"choice": [2, 4, 8]},
    }
    return SearchConfig.model_validate({"trials": 12, "space": space, **changes})


def searcher(
    study: optuna.Study, search: SearchConfig, seed: int = 0, refused: tuple[str, ...] = ()
) -> StudySearcher:
    def prepare(trial: str, params: dict[str, Any]) -> int:
        if trial in refused:
            raise ConfigError("method.rank=2", "does not go with it", "write 4")
        return 100

    return StudySearcher(study, search, seed, prepare)


def loss(params: dict[str, Any], examples: int) -> float:
    return float(abs(params["train.lr"] - 0.01) + 10 / params["method.rank"] + 1 / examples)


def drive(one: StudySearcher, count: int) -> list[dict[str, Any]]:
    """Trials one after the other; the draws."""
    drawn = []
    for index in range(count):
        config = one.suggest(f"tune-{index}")
        if config == Searcher.FINISHED:
            break
        assert isinstance(config, dict)
        drawn.append(config["params"])
        for examples in (50, 100):
            report = {"examples": examples, "eval_loss": loss(config["params"], examples)}
            one.on_trial_result(f"tune-{index}", report)
        value = report["eval_loss"]
        end = {"outcome": "completed", "values": [value], "best_eval_loss": value, "examples": 100}
        one.on_trial_complete(f"tune-{index}", {**end, "wall_s": 1.0})
    return drawn


NUMBERS = {
    "train.lr": {"log_uniform": [1e-5, 1e-1]},
    "method.rank": {"int_uniform": [2, 8]},
}
LEVELS = {
    "train.lr": {"choice": [10.0**-power for power in range(1, 7)]},
    "method.rank": {"choice": [2, 4]},
}


@pytest.mark.parametrize(
    ("sampler", "space"),
    [
        ("tpe", None),
        ("cmaes", NUMBERS),
        pytest.param("random", None, marks=pytest.mark.slow),
        pytest.param("gp", None, marks=pytest.mark.slow),
        pytest.param("grid", LEVELS, marks=pytest.mark.slow),
    ],
)
def test_a_seed_draws_the_same_trials_again_also_over_a_resume(
    tmp_path: Path, sampler: str, space: dict[str, Any] | None
) -> None:
    search = search_config(sampler=sampler, **({"space": space} if space else {}))
    draws = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        draws.append(drive(searcher(open_study("s", tmp_path / name, search, False), search), 20))
    assert draws[0] == draws[1]
    assert len(draws[0]) == 12
    assert len({tuple(params.values()) for params in draws[0]}) == 12
    if space != LEVELS:
        assert len({params["train.lr"] for params in draws[0]}) == 12

    (tmp_path / "c").mkdir()
    first = drive(searcher(open_study("s", tmp_path / "c", search, False), search), 5)
    rest = drive(searcher(open_study("s", tmp_path / "c", search, True), search), 20)
    assert first + rest == draws[0]

    (tmp_path / "d").mkdir()
    study = open_study("s", tmp_path / "d", search, False)
    assert drive(searcher(study, search, seed=1), 3) != draws[0][:3]


@pytest.mark.parametrize("known", [0, 1, 2])
def test_a_trial_that_was_being_drawn_when_its_driver_died_is_drawn_to_its_end(
    tmp_path: Path, known: int
) -> None:
    search = search_config()
    draws = drive(searcher(open_study("whole", tmp_path, search, False), search), 7)
    study = open_study("cut", tmp_path, search, False)
    drive(searcher(study, search), 6)
    study.sampler = JointSampler(search, 0)
    study.ask(dict(list(distributions(search.space).items())[:known]))
    again = searcher(open_study("cut", tmp_path, search, True), search)
    first, second = again.suggest("x"), again.suggest("y")
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert first["params"].keys() == search.space.keys()
    assert first["params"] == draws[6]
    assert (first["number"], second["number"]) == (6, 7)


def test_an_end_that_cannot_be_told_is_not_hidden_by_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = search_config()
    study = open_study("s", tmp_path, search, False)
    one = searcher(study, search)
    one.suggest("a")

    def fail(*_: object, **__: object) -> None:
        raise OSError("the database is away")

    end = {"outcome": "completed", "values": [1.0], "best_eval_loss": 1.0, "examples": 90}
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", fail)
        with pytest.raises(OSError, match="away"):
            one.on_trial_complete("a", end)
    one.on_trial_complete("a", error=True)  # as Tune does then
    assert one.left == search.trials - 1


def test_tpe_looks_where_it_is_good(tmp_path: Path) -> None:
    search = search_config(trials=30)
    study = open_study("s", tmp_path, search, False)
    drawn = drive(searcher(study, search), 30)
    late = [params["method.rank"] for params in drawn[10:]]
    assert late.count(8) > len(late) / 2  # a third by chance


def test_ends_are_told_as_what_they_are(tmp_path: Path) -> None:
    search = search_config(trials=6)
    study = open_study("s", tmp_path, search, False)
    one = searcher(study, search, refused=("trial-001",))
    for name in "abcd":
        one.suggest(name)
    report = {"examples": 50, "eval_loss": 2.0}
    one.on_trial_result("a", {"examples": 0, "eval_loss": 9.0})
    one.on_trial_result("a", report)
    one.on_trial_complete("a", {"examples": 100, "eval_loss": 2.5, "wall_s": 3.0})
    one.on_trial_complete("b", {"outcome": "failed", "error": "Diverged: step 2", "examples": 50})
    one.on_trial_result("c", {"examples": 50, "eval_loss": float("nan")})
    one.on_trial_complete(
        "c", {"outcome": "early_stopped", "values": [1.0], "best_eval_loss": 1.0, "examples": 90}
    )
    found = rows(study, search)
    assert [(row.status, row.eval_loss, row.examples) for row in found] == [
        ("pruned", 2.0, 100),
        ("failed", None, 0),  # never begun: its values do not go together
        ("failed", None, 50),
        ("early_stopped", 1.0, 90),
        ("interrupted", None, 0),
    ]
    assert found[1].error == "method.rank=2 does not go with it; write 4"
    assert found[2].error == "Diverged: step 2"
    assert study.trials[0].state == TrialState.PRUNED
    assert study.trials[0].intermediate_values == {50: 2.0, 100: 2.5}
    assert study.best_trial.number == 3
    assert unfinished(study) == [4]

    again = searcher(study, search)
    first, second = again.suggest("x"), again.suggest("y")
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert (first["number"], first["params"]) == (4, found[4].params)
    assert second["number"] == 5
    assert again.suggest("z") == Searcher.FINISHED


def test_nothing_is_drawn_while_the_sweep_is_held(tmp_path: Path) -> None:
    search = search_config()
    study = open_study("held", tmp_path, search, False)
    one = StudySearcher(study, search, 0, lambda trial, params: 100, lambda: True)
    assert one.suggest("tune-0") is None
    assert study.trials == []


def test_a_shared_storage_never_merges_two_sweeps(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    open_study("s", tmp_path / "one", search_config(storage=url), False).ask()
    open_study("other", tmp_path / "two", search_config(storage=url), False)
    with pytest.raises(StorageError, match=r"study s exists in search\.storage"):
        open_study("s", tmp_path / "three", search_config(storage=url), False)
    assert len(open_study("s", tmp_path / "one", search_config(storage=url), True).trials) == 1


def test_a_storage_that_cannot_be_opened_is_the_users_to_mend(tmp_path: Path) -> None:
    search = search_config(storage=f"sqlite:///{tmp_path}/none/there.db")
    with pytest.raises(StorageError, match=r"search\.storage=sqlite.* cannot be opened"):
        open_study("s", tmp_path, search, False)


def test_no_trial_begins_once_it_is_over(tmp_path: Path) -> None:
    search = SearchConfig.model_validate({"space": {"train.lr": {"uniform": [0, 1]}}})
    study = open_study("s", tmp_path, search, False)
    over: list[bool] = []
    searcher = StudySearcher(study, search, 0, lambda name, params: 9, over=lambda: bool(over))
    assert isinstance(searcher.suggest("a"), dict)
    over.append(True)
    assert searcher.suggest("b") == Searcher.FINISHED
    again = StudySearcher(study, search, 0, lambda name, params: 9, over=lambda: bool(over))
    assert again.suggest("a") == Searcher.FINISHED  # the first one waits for a larger budget
    over.clear()
    resumed = again.suggest("a")
    assert isinstance(resumed, dict)
    assert resumed["number"] == 0
