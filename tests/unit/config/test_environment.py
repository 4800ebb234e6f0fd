"""What a job says about who has submitted it."""

from __future__ import annotations

import json

import pytest

from raytune_ft.config.environment import VERSION, check_submitter, names_in
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
