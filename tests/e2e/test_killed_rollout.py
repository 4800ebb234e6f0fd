"""SIGKILL while the model speaks, or between the steps of a rollout: resumed, nothing differs."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_ft.config.load import to_plain
from tests.support.commands import command, run_process
from tests.support.objectives import config_of, save_inputs
from tests.support.runs import evaluations, final_weights, losses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
BATCH, STEPS = 4, 10
CASES: dict[str, tuple[list[str], int, dict[str, Any], dict[str, Any]]] = {
    # One answer before training, then one for each step and for the evaluation after step 5.
    "in token 17 of a rollout": (["said", "6", "17"], 4, {}, {}),
    "in token 17 of an evaluation": (["said", "7", "17"], 4, {}, {}),
    # The second rollout is of steps 5 to 8.
    "between the steps of a rollout": (
        ["step", "7", "0"],
        6,
        {"steps_per_generation": 2, "num_iterations": 2},
        {"beta": 0.1},
    ),
}
"""How it is killed, the step of the checkpoint from which it goes on, and settings."""


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost(tmp_path: Path, name: str) -> None:
    moment, step, rollout, grpo = CASES[name]
    inputs = save_inputs(tmp_path / "inputs")
    config = config_of(
        inputs,
        "grpo",
        {
            "storage": str(tmp_path / "runs"),
            "train.rollout": {
                "num_generations": 3,
                "max_completion_length": 24,
                "keep": 1000,
                **rollout,
            },
            "train.grpo": grpo,
            "train.batch_size": BATCH,
            "train.max_examples": BATCH * STEPS,
            "train.eval_every_examples": BATCH * 5,
            "checkpoint.every_examples": BATCH * 2,
            "checkpoint.asynchronous": False,
            "parallel": {"workers": 1},
        },
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_plain(config)))
    whole, cut = (tmp_path / "runs" / each for each in ("whole", "cut"))
    done = run_process(command("train", str(file), "name=whole"), 240)
    assert done.returncode == 0, done.stderr
    killed = [sys.executable, "-m", "tests.support.killed", *moment, "train", str(file)]
    done = run_process([*killed, "name=cut"], 240)
    assert done.returncode == -signal.SIGKILL, done.stderr
    newest = max(int(path.name[5:]) for path in (cut / "checkpoints").glob("step-*"))
    assert newest == step
    inside = cut / "checkpoints" / f"step-{newest:06d}" / "state" / "rollout.safetensors"
    assert inside.is_file() == (moment[0] == "step")
    done = run_process(command("train", str(file), "name=cut", "--resume"), 240)
    assert done.returncode == 0, done.stderr
    assert len(losses(whole)) == STEPS
    assert losses(cut) == losses(whole)
    assert evaluations(cut) == evaluations(whole)
    assert (cut / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    rows = [json.loads(line) for line in (cut / "rollouts.jsonl").read_text().splitlines()]
    each = 3 * BATCH * rollout.get("steps_per_generation", 1)
    rollouts = -(-STEPS // (4 if rollout else 1))
    assert len(rows) == each * rollouts
    ends, own = final_weights(whole), final_weights(cut)
    assert all(bool((ends[key] == own[key]).all()) for key in ends)
