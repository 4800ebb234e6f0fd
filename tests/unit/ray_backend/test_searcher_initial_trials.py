"""A sweep that learns from earlier ones, whose trials are not its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.data import DataConfig, SourceConfig
from raytune_ft.config.load import apply_overrides, dump_yaml
from raytune_ft.config.schema import Config
from raytune_ft.config.search import SearchConfig
from raytune_ft.errors import StorageError
from raytune_ft.ray_backend.searcher import StudySearcher
from raytune_ft.search.initial_trials import FROM, earlier_trials
from raytune_ft.search.study import open_study, own_trials, rows

CONFIG = Config(name="s", data=DataConfig(train=SourceConfig(path="/x.jsonl")))
LR, RANK = {"log_uniform": [1e-5, 1e-1]}, {"choice": [4, 8]}
BEST = 1e-3


def drive(config: Config, sweep_dir: Path, count: int) -> list[dict[str, Any]]:
    """Draws of so many trials, each told how far its rate is from the best one."""
    assert config.search is not None
    sweep_dir.mkdir(exist_ok=True)
    (sweep_dir / "config.yaml").write_text(dump_yaml(config))
    one = StudySearcher(
        open_study("s", sweep_dir, config.search, True), config.search, 0, lambda *trial: 100
    )
    drawn = []
    for index in range(count):
        trial = one.suggest(str(index))
        if not isinstance(trial, dict):
            break
        loss = abs(trial["params"]["train.lr"] - BEST)
        end = {"outcome": "completed", "values": [loss], "best_eval_loss": loss, "examples": 100}
        one.on_trial_complete(str(index), end)
        drawn.append(trial)
    return drawn


def sweep(**search: Any) -> Config:
    section = {"trials": 12, "space": {"train.lr": LR}, **search}
    return apply_overrides(CONFIG, {"search": section})


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    drive(sweep(), tmp_path / "earlier", 12)
    return tmp_path / "earlier"


def test_earlier_trials_teach_and_are_not_counted(tmp_path: Path, earlier: Path) -> None:
    config = sweep(warm_start=str(earlier), trials=4)
    search = config.search
    assert search is not None
    drawn = drive(config, tmp_path / "new", 2)
    drawn += drive(config, tmp_path / "new", 9)
    assert [trial["number"] for trial in drawn] == [0, 1, 2, 3]
    assert [trial["trial"] for trial in drawn] == [f"trial-00{number}" for number in range(4)]
    study = open_study("s", tmp_path / "new", search, True)
    assert len(study.trials) == 16  # and not more after a resume
    assert [row.id for row in rows(study, search)] == [trial["trial"] for trial in drawn]
    assert {trial.user_attrs.get(FROM) for trial in own_trials(study)} == {None}
    cold = drive(sweep(trials=4), tmp_path / "cold", 4)
    assert [trial["params"] for trial in cold] != [trial["params"] for trial in drawn]
    misses = [[abs(t["params"]["train.lr"] - BEST) for t in each] for each in (drawn, cold)]
    assert sum(misses[0]) < sum(misses[1])


def test_a_trial_outside_of_the_space_is_left_out(tmp_path: Path, earlier: Path) -> None:
    narrow = sweep(space={"train.lr": {"log_uniform": [1e-4, 1e-2]}}, warm_start=[str(earlier)])
    assert narrow.search is not None
    found = earlier_trials(narrow.search)
    assert 0 < len(found) < 12
    assert all(1e-4 <= trial.params["train.lr"] <= 1e-2 for trial in found)


def test_what_was_not_searched_had_the_value_of_its_file(earlier: Path) -> None:
    space = {"train.lr": LR, "train.batch_size": {"choice": [8, 16]}}
    wider = sweep(space=space, warm_start=str(earlier)).search
    other = sweep(space={**space, "train.batch_size": RANK}, warm_start=str(earlier)).search
    assert wider is not None
    assert other is not None
    assert {trial.params["train.batch_size"] for trial in earlier_trials(wider)} == {16}
    assert earlier_trials(other) == []


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"space": {"method.rank": RANK}}, "searched over train.lr, and this sweep over none of"),
        ({"metric": "eval_exact_match"}, "was judged by eval_loss; write search.metric: eval_loss"),
    ],
)
def test_a_sweep_of_something_else_is_refused(
    earlier: Path, search: dict[str, Any], message: str
) -> None:
    config = sweep(warm_start=str(earlier), **search).search
    assert config is not None
    with pytest.raises(StorageError) as caught:
        earlier_trials(config)
    assert message in str(caught.value)


def test_a_directory_without_a_sweep_is_refused(tmp_path: Path) -> None:
    search = SearchConfig.model_validate({"space": {"train.lr": LR}, "warm_start": str(tmp_path)})
    with pytest.raises(StorageError, match=r"holds no config\.yaml of a sweep"):
        earlier_trials(search)
    (tmp_path / "config.yaml").write_text(dump_yaml(CONFIG))
    with pytest.raises(StorageError, match="is a run, not a sweep"):
        earlier_trials(search)
    (tmp_path / "config.yaml").write_text(dump_yaml(sweep()))
    with pytest.raises(StorageError, match=r"holds no study\.db"):
        earlier_trials(search)
