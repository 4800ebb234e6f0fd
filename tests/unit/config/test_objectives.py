"""Keys and sources that do not go with the objective are refused, and hashes stay."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.config import rules
from raytune_ft.config.execution import packable
from raytune_ft.config.identity import check_resume, config_sha256
from raytune_ft.config.load import apply_overrides, validated
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError


def config(train: dict[str, Any], source: dict[str, Any], **data: Any) -> Config:
    sections = {"train": {"path": "a.jsonl", **source}, **data}
    return validated({"name": "x", "data": sections, "train": train})


@pytest.mark.parametrize(
    ("train", "source", "data", "message"),
    [
        ({"objective": "clm"}, {}, {}, "write format: text, or train.objective: sft, kd"),
        ({"objective": "kd"}, {}, {}, "needs a teacher"),
        ({"kd": {"teacher": "t"}}, {}, {}, "is for train.objective=kd, and this is sft"),
        ({"class_weights": "balanced"}, {}, {}, "is for train.objective=classification"),
        ({}, {}, {"labels": ["a", "b"]}, "is for train.objective=classification"),
        ({}, {"format": "classification"}, {}, "train.objective=sft learns from"),
        ({}, {"train_on": ["user"]}, {}, "is for format: messages"),
        ({}, {"rows": "file"}, {}, "is for .txt files"),
        ({}, {}, {"chunk": {}}, "cuts documents"),
        (
            {"objective": "rationale"},
            {"format": "rationale", "rationale_until": "("},
            {},
            "rationale_until=.* is not a regular expression",
        ),
        (
            {"objective": "clm"},
            {"format": "text"},
            {"chunk": {"overlap": 511}},
            "leaves no room for new tokens",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    train: dict[str, Any], source: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        rules.check(config(train, source, **data))


def test_keys_that_change_the_loss_change_the_hash() -> None:
    plain = Config.model_validate({"name": "x", "data": {"train": {"path": "a.jsonl"}}})
    assert config_sha256(plain) == config_sha256(config({"label_smoothing": 0.0}, {}))
    assert config_sha256(config({"label_smoothing": 0.1}, {})) != config_sha256(plain)
    assert config_sha256(config({}, {"example_weight": "w"})) != config_sha256(plain)


def test_where_a_teacher_is_moves_no_weight() -> None:
    live = config({"objective": "kd", "kd": {"teacher": "o/n"}}, {})
    kept = apply_overrides(live, {"train.kd.cache": "disk", "train.kd.cache_limit_gib": 1.0})
    assert config_sha256(live) == config_sha256(kept)
    check_resume(live, kept)
    with pytest.raises(ConfigError, match=r"train\.kd\.teacher=o/m"):
        check_resume(live, apply_overrides(live, {"train.kd.teacher": "o/m"}))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("train.kd.teacher", ["o/n", "o/m"]),
        ("train.precision", ["float32", "bfloat16"]),
        ("train.kd", [{"teacher": "o/n"}]),
    ],
)
def test_trials_share_the_logits_of_one_teacher(key: str, values: list[Any]) -> None:
    plain: dict[str, Any] = {
        "name": "x",
        "data": {"train": {"path": "a.jsonl"}},
        "train": {"objective": "kd", "kd": {"teacher": "o/n", "cache": "disk"}},
        "search": {"trials": 2, "space": {key: {"choice": values}}},
    }
    with pytest.raises(ConfigError, match="keeps those of one teacher"):
        rules.check(validated(plain))
    plain["train"]["kd"]["cache"] = "memory"
    rules.check(validated(plain))


def test_clm_cuts_documents_by_itself() -> None:
    found = resolve(config({"objective": "clm"}, {"format": "text", "path": "o/n"}))
    assert found.data.chunk is not None


def test_what_is_not_packed_says_why() -> None:
    classes = config({"objective": "classification"}, {"format": "classification"})
    assert "a head" in str(packable(classes))
    assert "noise" in str(packable(config({"neftune_alpha": 5.0}, {})))
    assert packable(config({"objective": "clm"}, {"format": "text"})) is None
