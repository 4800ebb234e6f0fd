"""Lines of the config as distributions, and drawn values as a trial's config."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from raytune_ft.config.search import Distribution
from raytune_ft.errors import ConfigError
from raytune_ft.search.results import apply_params, trial_name
from raytune_ft.search.space import decode, distributions
from tests.support.runs import make_config

SPACE = {
    "train.lr": Distribution(log_uniform=[1e-5, 1e-3]),
    "train.weight_decay": Distribution(uniform=[0, 1]),
    "method.rank": Distribution(int_uniform=[2, 8]),
    "method.targets": Distribution(choice=["all-linear", ["q_proj"], ["q_proj", "v_proj"]]),
    "method.rslora": Distribution(choice=[True, False]),
}


def test_every_draw_lies_in_its_line_and_makes_a_config(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "rows.jsonl")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(40):
        params = decode(SPACE, study.ask(distributions(SPACE)).params)
        assert 1e-5 <= params["train.lr"] <= 1e-3
        assert 0 <= params["train.weight_decay"] <= 1
        assert params["method.rank"] in range(2, 9)
        assert params["method.targets"] in SPACE["method.targets"].values
        own = apply_params(config, params, "trial-000", str(tmp_path / "trials"))
        assert own.method.model_dump()["targets"] == params["method.targets"]
        assert (own.train.lr, own.name, own.search) == (params["train.lr"], "trial-000", None)
        seen.add(str(params["method.targets"]))
    assert len(seen) == 3


def test_choices_that_are_equal_to_python_stay_apart() -> None:
    space = {"x": Distribution(choice=[1, True, 1.0, "1"])}
    for value in (1, True, 1.0, "1"):
        drawn = decode(space, {"x": value})["x"]
        assert type(drawn) is type(value)


def test_values_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "rows.jsonl", {"parallel.workers": 4})
    with pytest.raises(ConfigError, match=r"batch_size=2 is smaller than parallel\.workers=4"):
        apply_params(config, {"train.batch_size": 2}, "trial-000", str(tmp_path))


def test_names_sort_as_their_numbers() -> None:
    names = [trial_name(number) for number in range(120)]
    assert sorted(names) == names
