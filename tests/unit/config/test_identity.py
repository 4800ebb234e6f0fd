"""Which changes are another experiment, and which a resume may make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.data import DataConfig, SourceConfig
from raytune_ft.config.identity import check_resume, config_sha256
from raytune_ft.config.load import apply_overrides
from raytune_ft.config.reference import keys, methods
from raytune_ft.config.schema import Config
from raytune_ft.config.search import SearchConfig
from raytune_ft.config.search_rules import check_examples
from raytune_ft.errors import ConfigError

CONFIG = Config(name="a", data=DataConfig(train=SourceConfig(path="/x.jsonl")))
CONSTANT = apply_overrides(CONFIG, {"train.lr_schedule": "constant", "train.max_examples": 100})
SEARCH = {"search": {"trials": 4, "space": {"train.lr": {"choice": [1.0, 2.0]}}}}

FREE = {
    "storage": "/elsewhere",
    "parallel.workers": 2,
    "parallel.strategy": "fsdp",
    "parallel.max_failures": 0,
    "parallel.accelerator": "H100",
    "parallel.label_selector": {"zone": "a"},
    "parallel.placement": "SPREAD",
    "checkpoint.every_examples": 7,
    "data.packing": False,
    "train.micro_tokens": 64,
}
FIXED = {
    "seed": 1,
    "model.path": "other",
    "method.rank": 4,
    "data.train.path": "/y.jsonl",
    "data.validation": 0.1,
    "data.max_length": 64,
    "train.lr": 1.0,
    "train.batch_size": 8,
    "train.eval_every_examples": 5,
    "train.precision": "float32",
    "train.early_stopping.patience": 2,
}


@pytest.mark.parametrize("key", FREE)
def test_layout_is_free(key: str) -> None:
    changed = apply_overrides(CONFIG, {key: FREE[key]})
    assert changed != CONFIG
    assert config_sha256(changed) == config_sha256(CONFIG)
    check_resume(CONFIG, changed)


def test_a_file_that_came_with_a_job_is_the_same_wherever_it_was_unpacked() -> None:
    ray = "/tmp/ray/session_{}/runtime_resources/working_dir_files/_ray_pkg_{}/rows.jsonl"
    one, two, other = (
        apply_overrides(CONFIG, {"data.train.path": path})
        for path in (ray.format(1, "0a1b"), ray.format(2, "ffff"), ray.format(1, "0a1b") + "x")
    )
    check_resume(one, two)
    assert config_sha256(one) == config_sha256(two)
    with pytest.raises(ConfigError):
        check_resume(one, other)


@pytest.mark.parametrize("key", FIXED)
def test_what_changes_the_math_is_refused_by_name_with_both_values(key: str) -> None:
    changed = apply_overrides(CONFIG, {key: FIXED[key]})
    assert config_sha256(changed) != config_sha256(CONFIG)
    with pytest.raises(ConfigError) as caught:
        check_resume(CONFIG, changed)
    assert key.removesuffix(".patience") in str(caught.value)
    assert "(the run has " in str(caught.value)


def test_switching_the_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.name=full \(the run has lora\)"):
        check_resume(CONFIG, apply_overrides(CONFIG, {"method.name": "full"}))


def test_the_budget_may_be_raised_under_a_constant_rate() -> None:
    more = apply_overrides(CONSTANT, {"train.max_examples": 200})
    check_resume(CONSTANT, more)
    assert config_sha256(more) == config_sha256(CONSTANT)
    with pytest.raises(ConfigError, match="may only be raised"):
        check_resume(more, CONSTANT)


@pytest.mark.parametrize(
    "horizon", [{"train.lr_schedule": "cosine"}, {"train.warmup_fraction": 0.1}]
)
def test_the_budget_may_not_change_where_the_rate_depends_on_it(horizon: dict[str, Any]) -> None:
    saved = apply_overrides(CONSTANT, horizon)
    more = apply_overrides(saved, {"train.max_examples": 200})
    assert config_sha256(more) != config_sha256(saved)
    with pytest.raises(ConfigError, match=r"train\.max_examples=200 \(the run has 100\) cannot"):
        check_resume(saved, more)


def test_one_epoch_written_or_not_is_the_same_budget() -> None:
    check_resume(CONFIG, apply_overrides(CONFIG, {"train.epochs": 1}))


def test_a_sweep_may_gain_trials_and_nothing_else() -> None:
    sweep = apply_overrides(CONFIG, SEARCH)
    check_resume(sweep, apply_overrides(sweep, {"search.trials": 9, "search.max_concurrent": 1}))
    check_resume(sweep, apply_overrides(sweep, {"search.budget.examples": 5000}))
    for change in ({"search.trials": 3}, {"search.space.train.lr": {"choice": [3.0]}}):
        with pytest.raises(ConfigError):
            check_resume(sweep, apply_overrides(sweep, change))


def test_the_budget_of_a_sweep_stays() -> None:
    sweep = apply_overrides(CONFIG, SEARCH | {"train.lr_schedule": "constant"})
    with pytest.raises(ConfigError, match="cannot change in a sweep"):
        check_resume(sweep, apply_overrides(sweep, {"train.epochs": 3}))


def test_a_grace_period_beyond_the_budget_is_refused_once_the_data_is_known() -> None:
    search = apply_overrides(CONFIG, SEARCH).search
    assert search is not None
    check_examples(search, 1000)
    with pytest.raises(ConfigError, match=r"grace_examples=1000 is more than the 999 examples"):
        check_examples(search, 999)


def test_a_budget_below_one_trial_is_refused_once_the_data_is_known() -> None:
    search = apply_overrides(CONFIG, SEARCH | {"search.budget.examples": 1500}).search
    assert search is not None
    check_examples(search, 1500)
    with pytest.raises(ConfigError, match=r"examples=1500 is less than the 1501 examples of one"):
        check_examples(search, 1501)


def test_the_reference_knows_every_key() -> None:
    dotted = {key.dotted for key in keys()}
    assert {"name", "method.rank", "data.test.path", "search.space.KEY.choice"} <= dotted
    activations = {"loreft", "adapter", "prompt", "p_tuning", "prefix"}
    weights = {"full", "freeze", "lora", "qlora", "ia3", "vera", "oft"}
    assert set(methods()) == weights | activations
    assert SearchConfig.model_fields.keys() <= {key.split(".")[1] for key in dotted if "." in key}


def test_shipped_files_load() -> None:
    from raytune_ft.config.load import load_config
    from raytune_ft.config.resolve import resolve

    shipped = sorted((Path(__file__).parents[3] / "jobs").glob("*.yaml"))
    assert len(shipped) >= 2
    for path in shipped:
        resolve(load_config(path))
