"""SIGKILL of the whole driver at some step; with --resume it ends as if it had not been."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.support.commands import command, kill_when, run_process
from tests.support.runs import evaluations, losses

pytestmark = pytest.mark.e2e
STEPS = 48


def _arguments(tmp_path: Path, name: str, *more: str) -> list[str]:
    return command(
        "train",
        "jobs/quickstart.yaml",
        f"storage={tmp_path}",
        f"name={name}",
        "train.lr=3e-3",
        "train.epochs=null",
        f"train.max_examples={16 * STEPS}",
        "train.eval_every_examples=256",
        "checkpoint.every_examples=100",
        *more,
    )


def _check(tmp_path: Path, layout: list[str], tolerance: float) -> None:
    whole = run_process(_arguments(tmp_path, "whole"), 300)
    assert whole.returncode == 0, whole.stderr
    step = random.randrange(8, STEPS - 4)
    print("killed at step", step)
    broken = tmp_path / "broken"
    kill_when(_arguments(tmp_path, "broken", *layout), broken / "metrics.jsonl", step)
    assert not (broken / "result.json").exists()
    assert 0 < len(losses(broken)) < STEPS

    again = run_process([*_arguments(tmp_path, "broken", *layout), "--resume"], 300)
    assert again.returncode == 0, again.stderr
    assert json.loads((broken / "result.json").read_text())["status"] == "completed"
    for values in (losses, evaluations):
        pairs = zip(values(tmp_path / "whole"), values(broken), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= tolerance


@pytest.mark.slow
def test_one_process(tmp_path: Path) -> None:
    _check(tmp_path, [], 0.0)


@pytest.mark.slow
@pytest.mark.ray
def test_two_ray_workers(tmp_path: Path) -> None:
    _check(tmp_path, ["parallel.workers=2"], 1e-4)
