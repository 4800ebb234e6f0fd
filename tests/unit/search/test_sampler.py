"""What a trial is made of: samplers, branches, constraints, first points."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna._transform import _SearchSpaceTransform
from optuna.samplers import CmaEsSampler

from raytune_ft.config.data import DataConfig, SourceConfig
from raytune_ft.config.load import apply_overrides
from raytune_ft.config.schema import Config
from raytune_ft.config.search import SearchConfig
from raytune_ft.config.search_space import grid
from raytune_ft.errors import ConfigError
from raytune_ft.search.initial_trials import first_points, published_lr
from raytune_ft.search.sampler import JointSampler, ReplayedCmaEs
from raytune_ft.search.space import decode

LR = {"log_uniform": [1e-5, 1e-1]}
BRANCHES = {
    "method.name": {"choice": ["lora", "full"]},
    "method.rank": {"int_uniform": [2, 8]},
    "train.lr": LR,
    "method.alpha": {"uniform": [1.0, 64.0], "when": {"method.rslora": True}},
    "method.rslora": {"choice": [True, False]},
}


def search_config(**changes: Any) -> SearchConfig:
    return SearchConfig.model_validate({"trials": 30, "space": BRANCHES, **changes})


def points(search: SearchConfig, seed: int = 0, given: Any = ()) -> list[dict[str, Any]]:
    """All trials of a study whose loss is known at once."""
    study = optuna.create_study(sampler=JointSampler(search, seed, given))
    drawn = []
    for _ in range(int(search.trials)):
        trial = study.ask()
        JointSampler(search, seed, given).suggest(trial)
        point = decode(search.space, trial.params)
        study.tell(trial, abs(point["train.lr"] - 1e-3) + (point.get("method.name") == "full"))
        drawn.append(point)
    return drawn


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_what_a_branch_lacks_is_not_drawn(sampler: str) -> None:
    search = search_config(sampler=sampler, trials=10 if sampler == "gp" else 30)
    drawn = points(search)
    names = {point["method.name"] for point in drawn}
    assert names == {"lora", "full"}
    for point in drawn:
        lora = point["method.name"] == "lora"
        assert ("method.rank" in point) == ("method.rslora" in point) == lora
        assert ("method.alpha" in point) == (lora and point["method.rslora"])
    assert points(search) == drawn
    assert points(search, seed=1) != drawn


def test_tpe_learns_inside_a_branch() -> None:
    drawn = points(search_config(trials=40))
    assert [point["method.name"] for point in drawn[20:]].count("lora") > 13


@pytest.mark.parametrize(
    "sampler", ["tpe", pytest.param("gp", marks=pytest.mark.slow), "random", "cmaes"]
)
def test_every_draw_meets_the_constraints(sampler: str) -> None:
    space = {"train.lr": LR, "train.batch_size": {"int_uniform": [1, 64]}}
    constraint = "train.batch_size * train.lr <= 0.001 and not train.batch_size < 16"
    trials = 5 if sampler == "gp" else 12
    search = search_config(sampler=sampler, trials=trials, space=space, constraints=[constraint])
    drawn = points(search)
    assert all(each["train.batch_size"] * each["train.lr"] <= 1e-3 for each in drawn)
    assert all(each["train.batch_size"] >= 16 for each in drawn)
    assert len({each["train.lr"] for each in drawn}) == trials


def test_a_constraint_that_is_seldom_met_is_met_all_the_same() -> None:
    space = {"train.lr": LR, "train.batch_size": {"int_uniform": [1, 1000]}}
    tight = search_config(trials=3, space=space, constraints=["train.batch_size == 77"])
    assert [each["train.batch_size"] for each in points(tight)] == [77, 77, 77]


def test_a_constraint_of_another_branch_is_no_constraint() -> None:
    search = search_config(constraints=["method.rank <= 2", "train.lr < 0.01"])
    drawn = points(search)
    assert {point.get("method.rank") for point in drawn} == {2, None}


def test_a_grid_has_every_combination_once_in_an_order_of_the_seed() -> None:
    space = {
        "method.name": {"choice": ["lora", "full"]},
        "method.rank": {"int_uniform": [2, 4]},
        "train.lr": {"choice": [1e-3, 1e-2, 1e-3]},
    }
    search = search_config(sampler="grid", trials=8, space=space)
    whole = grid(search)
    assert len(whole) == 8  # 3 ranks of LoRA and none of full, at two rates
    drawn = points(search)
    assert sorted(map(repr, drawn)) == sorted(map(repr, whole))
    assert points(search) == drawn != points(search, seed=1)
    small = search_config(sampler="grid", space=space, constraints=["method.rank != 3"])
    assert len(grid(small)) == 6


def test_a_trial_repeats_another_only_where_nothing_else_is_left() -> None:
    space = {"train.lr": {"choice": [1e-3, 1e-2, 1e-1]}, "method.rank": {"choice": [2, 4]}}
    drawn = points(search_config(trials=7, space=space))
    assert len({repr(point) for point in drawn[:6]}) >= 5
    assert len(drawn) == 7


def config(**search: Any) -> Config:
    bare = Config(name="a", data=DataConfig(train=SourceConfig(path="/x.jsonl")))
    return apply_overrides(
        bare, {"train.lr": 2e-4, "search": {"space": {"train.lr": LR}, **search}}
    )


def test_the_files_own_values_come_first_then_points_then_the_published_rate() -> None:
    own = config(first=[{"train.lr": 0.01}])
    assert [point["train.lr"] for point in first_points(own, "llama", 2000)] == [2e-4, 0.01, 5e-4]
    assert first_points(config(defaults=False), "llama", 2000) == []
    assert first_points(config(), "gpt2", None) == [{"train.lr": 2e-4}]
    far = apply_overrides(own, {"train.lr": 0.5})
    assert [point["train.lr"] for point in first_points(far, "llama", 2000)] == [0.01, 5e-4]
    assert len(first_points(config(trials=1), "llama", 2000)) == 1
    assert first_points(config(constraints=["train.lr > 0.001"]), "llama", 2000) == []


def test_a_point_takes_the_rest_from_the_file_or_draws_it() -> None:
    search = {"space": BRANCHES, "trials": 4, "defaults": False}
    given = [{"train.lr": 0.02}, {"method.name": "full"}, {"method.alpha": 2.0}]
    found = first_points(config(**search, first=given), "llama", 2000)
    # the file's rank of 16 is outside of the space, and alpha needs rslora, which the file has not
    assert found == [
        {"method.name": "lora", "train.lr": 0.02, "method.rslora": False},
        {"method.name": "full", "train.lr": 2e-4},
        {"method.name": "lora", "train.lr": 2e-4, "method.rslora": True, "method.alpha": 2.0},
    ]
    drawn = points(search_config(trials=4), given=found)
    for point, each in zip(found, drawn, strict=False):
        assert point.items() <= each.items()
    assert "method.rank" in drawn[0]


def test_the_published_rate() -> None:
    assert published_lr("lora", "llama", 2000) == pytest.approx(5e-4)
    assert published_lr("full", "llama", 2000) == pytest.approx(5e-5)
    assert published_lr("lora", "llama", 4096) == pytest.approx(2.86e-4, rel=0.01)
    assert published_lr("lora", "qwen2", 4096) == pytest.approx(4.73e-4, rel=0.01)
    assert published_lr("lora", "gpt2", 768) == pytest.approx(5e-4)


def test_a_draw_that_cannot_meet_a_constraint_gives_up(tmp_path: Path) -> None:
    impossible = search_config(trials=1, constraints=["train.lr > 1"])
    with pytest.raises(ConfigError, match=r"train\.lr > 1 is met by none of 100,000 draws"):
        points(impossible)


NUMBERS = {"train.lr": LR, "method.alpha": {"uniform": [1.0, 64.0]}}


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_cmaes_neither_writes_nor_loads_a_pickle(tmp_path: Path) -> None:
    search = search_config(sampler="cmaes", trials=40, space=NUMBERS)
    study = optuna.create_study(sampler=JointSampler(search, 0))
    planted = {"cma:optimizer:0": pickle.dumps(_Evil(tmp_path / "ran")).hex()}
    for number in range(40):
        trial = study.ask()
        study._storage.set_trial_system_attr(trial._trial_id, "cma:optimizer:0", *planted.values())
        JointSampler(search, 0).suggest(trial)
        study.tell(trial, abs(trial.params["train.lr"] - 1e-3))
        held = study.trials[number].system_attrs
        assert {key: held[key] for key in held if "optimizer" in key} == planted
    assert not (tmp_path / "ran").exists()
    assert max(each.system_attrs.get("cma:generation", 0) for each in study.trials) > 3


def test_the_state_of_cmaes_is_that_of_optuna() -> None:
    """Trials of Optuna's own sampler, whose last state is in the study."""
    study = optuna.create_study(sampler=CmaEsSampler(seed=3))
    for _ in range(40):
        trial = study.ask()
        x, y = trial.suggest_float("x", -4, 4), trial.suggest_float("y", 1e-5, 1e-1, log=True)
        study.tell(trial, x**2 + abs(np.log10(y) + 3))
    wanted: Any = CmaEsSampler(seed=0)._restore_optimizer(study.trials)
    space = study.trials[-1].distributions
    sampler = ReplayedCmaEs(seed=0)
    sampler._restore_optimizer(study.trials)
    found = sampler._init_optimizer(
        _SearchSpaceTransform(space, transform_0_1=True), study.direction
    )
    assert found.generation == wanted.generation > 3
    assert found._sigma == wanted._sigma
    assert (found._mean == wanted._mean).all()
    assert (found._C == wanted._C).all()
