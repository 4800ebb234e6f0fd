"""Which Python code of a saved config a command may run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.data import DataConfig, SourceConfig
from raytune_ft.config.load import apply_overrides
from raytune_ft.config.schema import Config
from raytune_ft.config.trust import check_code, named_code
from raytune_ft.errors import ConfigError

PLAIN = Config(name="a", data=DataConfig(train=SourceConfig(path="/x.jsonl")))
OWN, TASK = ["loss", "/x/own.py:score"], ["lm_eval:/x/task.yaml"]
JUDGE = {"name": "judge", "url": "http://elsewhere/v1", "model": "m"}
REMOTE = {"model.trust_remote_code": True, "model.path": "someone/else"}


@pytest.mark.parametrize(
    "changes",
    [
        {"promote.metrics": OWN},
        {"promote.metrics": TASK},
        REMOTE,
        REMOTE | {"promote.base": "/b"},
        {"model.path": "evil/${HF_TOKEN}"},
        {"promote.metrics": ["reward"], "rewards": ["/x/own.py:score"]},
        {"promote.metrics": ["win_rate:judge"], "rewards": [JUDGE]},
        {"promote.metrics": ["reward:judge"], "rewards": [{**JUDGE, "api_key": "${A_KEY}"}]},
    ],
)
def test_it_has_to_be_named_here_too(changes: dict[str, Any]) -> None:
    saved = apply_overrides(PLAIN, changes)
    for code in ((), named_code(PLAIN)):
        with pytest.raises(ConfigError, match=r"/runs/a/config\.yaml names.*; .*--trust-run"):
            check_code(saved, Path("/runs/a"), code)
    check_code(saved, Path("/runs/a"), named_code(saved))
    check_code(saved, Path("/runs/a"), None)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.path": "another/one"},
        {"model.revision": "0" * 40},
        {"promote.base": "another/one"},
    ],
)
def test_another_model_is_other_code(changes: dict[str, Any]) -> None:
    given = apply_overrides(PLAIN, REMOTE)
    saved = apply_overrides(given, changes)
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code=true with"):
        check_code(saved, Path("/runs/a"), named_code(given))


def test_rewards_that_no_metric_names_are_not_run() -> None:
    config = apply_overrides(PLAIN, {"rewards": ["/x/own.py:score", JUDGE]})
    check_code(config, Path("/runs/a"), ())


def test_the_harness_own_tasks_and_native_models_are_no_code_of_the_config() -> None:
    config = apply_overrides(PLAIN, {"promote.metrics": ["loss", "rouge", "lm_eval:arc_easy"]})
    check_code(config, Path("/runs/a"), ())


def test_a_folder_of_the_environment_and_a_servers_password_are_no_secrets_of_a_promotion() -> None:
    changes = {"model.path": "${MODELS}/x", "tracking.uri": "http://me:${MLFLOW_PASSWORD}@host"}
    check_code(apply_overrides(PLAIN, changes), Path("/runs/a"), ())
