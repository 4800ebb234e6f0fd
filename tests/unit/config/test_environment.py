"""What a job says about who has submitted it, and what torch reads."""

from __future__ import annotations

import json
import os

import pytest

from raytune_ft.config.environment import (
    ALLOCATOR,
    VERSION,
    check_submitter,
    grow_segments,
    names_in,
)
from raytune_ft.config.load import dump_yaml, expand_env
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def test_another_version_than_the_submitter_s_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB, raising=False)
    check_submitter("1.0")
    monkeypatch.setenv(JOB, json.dumps({"runtime_env": {}, "metadata": {"job_name": "x"}}))
    check_submitter("1.0")  # submitted by somebody else's means
    monkeypatch.setenv(JOB, json.dumps({"metadata": {VERSION: "1.0"}}))
    check_submitter("1.0")
    with pytest.raises(ConfigError, match=r"raytune_ft 1\.1 of the cluster differs from .* 1\.0"):
        check_submitter("1.1")


def test_names_of_variables_are_found_in_all_texts() -> None:
    plain = {"a": "${ONE}/x", "b": [{"c": "pw ${TWO} ${ONE}"}, 3, None], "d": "$THREE"}
    assert names_in(plain) == {"ONE", "TWO"}


def test_segments_grow_unless_the_user_has_set_the_allocator_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "max_split_size_mb:128")
        grow_segments()
        assert {each: os.environ.get(each) for each in ALLOCATOR} == {
            each: "max_split_size_mb:128" if each == name else None for each in ALLOCATOR
        }
        monkeypatch.delenv(name)
    grow_segments()
    assert os.environ[ALLOCATOR[0]] == "expandable_segments:True"


def test_the_key_of_a_judge_is_read_only_where_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    judge = {
        "name": "judge",
        "url": "http://127.0.0.1:9/v1",
        "model": "m",
        "api_key": "${JUDGE_KEY}",
    }
    config = Config.model_validate(
        {
            "name": "a",
            "model": {"path": "x"},
            "method": {"name": "lora"},
            "data": {"train": {"path": "rows.jsonl"}},
            "rewards": [judge],
        }
    )
    assert "${JUDGE_KEY}" in dump_yaml(expand_env(config))
    with pytest.raises(ConfigError, match="JUDGE_KEY"):
        expand_env(config, rewards=True)
    assert "swordfish" in dump_yaml(expand_env(config, {"JUDGE_KEY": "swordfish"}, rewards=True))
