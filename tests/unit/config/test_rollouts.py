"""`train.rollout.engine: vllm`: what vLLM cannot load is refused by the config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.identity import config_sha256
from raytune_ft.config.rules import check
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError
from tests.support.runs import make_config

VLLM = "train.rollout.engine"


def config_with(changes: dict[str, Any]) -> Config:
    grpo = {
        "train.objective": "grpo",
        "train.precision": "bfloat16",
        "data.train.format": "prompt",
        "rewards": ["exact_match"],
    }
    return make_config(Path("model"), Path("rows.jsonl"), {**grpo, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": {"name": "ia3"}}, "method.name=ia3 leaves weights that vLLM does not load"),
        ({"method": {"name": "freeze"}}, "method.name=freeze leaves weights"),
        ({"method.dora": True}, "method.dora=true is not in vLLM"),
        ({"method.alpha_pattern": {"q_proj": 6}}, "method.alpha_pattern={q_proj: 6.0} is not in"),
        ({"train.precision": "float32"}, "train.precision=float32 is not in vLLM with method.name"),
        ({"method.rank": 513}, "method.rank=513 makes an adapter of rank 513, and vLLM takes up"),
        (
            {"method.rank": 300, "method.init": "pissa"},
            "method.rank=300 makes an adapter of rank 600",
        ),
        (
            {"method": {"name": "full"}, "train.precision": "float64"},
            "train.precision=float64 is not in vLLM",
        ),
        (
            {"search": {"space": {"train.lr": {"choice": [1e-4, 1e-3]}}}},
            "train.rollout.engine=vllm is for one run",
        ),
    ],
)
def test_what_vllm_cannot_take_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(config_with({**changes, "train.rollout": {"engine": "vllm"}}))
    assert says in str(raised.value)
    assert "train.rollout.engine: embedded" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"name": "full"}, "train.precision": "float32"},
        {"method.rslora": True, "method.rank": 256, "method.init": "olora"},
        {"train.objective": "online_dpo"},
        {"train.objective": "ppo"},
    ],
)
def test_what_vllm_can_take(changes: dict[str, Any]) -> None:
    check(config_with({"train.rollout": {"engine": "vllm"}, **changes}))


def test_engines_are_of_vllm_and_do_not_change_the_numbers() -> None:
    two = {"vllm": {"engines": 2}}
    with pytest.raises(ConfigError, match=r"train\.rollout\.vllm=.* and this is auto"):
        check(config_with({"train.rollout": two}))
    one, other = (config_with({"train.rollout": {"engine": "vllm"} | each}) for each in ({}, two))
    assert config_sha256(one) == config_sha256(other)
    assert config_sha256(one) != config_sha256(config_with({}))


JUDGE = {"name": "judge", "url": "http://127.0.0.1:9/v1", "model": "m", "mode": "pairs"}
BY_WINS = {"promote": {"metrics": ["win_rate:judge"], "metric": "win_rate:judge"}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train.objective": "ppo"}, "rewards.judge compares completions, and train.objective=ppo"),
        ({}, "write promote: {metrics: [win_rate:judge], metric: win_rate:judge}, or mode: grade"),
        ({"promote.metrics": ["win_rate:judge"]}, "promotion has no reward of a model by itself"),
        (
            {"rewards": [JUDGE, {"name": "exact_match", "weight": 0.0}]},
            "promotion has no reward of a model by itself",
        ),
    ],
)
def test_where_a_judge_that_compares_is_of_no_use(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(config_with({"rewards": [JUDGE], **changes}))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        BY_WINS,
        {"train.objective": "online_dpo", **BY_WINS},
        {"rewards": [JUDGE, "exact_match"]},
        {"rewards": [JUDGE, "exact_match"], "train.watch": ["judge"]},
        {
            "train.objective": "sft",
            "data.train.format": "prompt_completion",
            "train.watch": ["judge"],
        },
    ],
)
def test_where_a_judge_may_compare(changes: dict[str, Any]) -> None:
    check(config_with({"rewards": [JUDGE], **changes}))
