"""The shipped GSM8K recipe on real data and a real pretrained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import command, run_process

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_a_sweep_of_eight_trials_on_two_workers(tmp_path: Path, shared_dir: Path) -> None:
    done = run_process(
        command(
            "sweep",
            "jobs/gsm8k_lora.yaml",
            f"storage={tmp_path}",
            f"model.path={shared_dir}/models/stories260k",
            f"data.train.path={shared_dir}/data/gsm8k/train.jsonl",
            f"data.test.path={shared_dir}/data/gsm8k/test.jsonl",
            "data.validation=0.02",
            "train.epochs=null",
            "train.max_examples=1200",
            "train.eval_every_examples=400",
            "train.precision=float32",
            "search.scheduler.grace_examples=400",
            "search.space.train.lr={log_uniform: [1e-3, 3e-2]}",
        ),
        1400,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gsm8k-lora" / "result.json").read_text())
    assert len(result["trials"]) == 8
    assert result["best"]["eval_loss"] < 0.5 * result["base"]["eval_loss"]
    measured = json.loads((tmp_path / "gsm8k-lora" / "promoted" / "evaluation.json").read_text())
    assert measured["split"] == "test"
    assert measured["examples"] > 1300
    assert measured["promoted"]["eval_loss"] < 0.5 * measured["base"]["eval_loss"]
