"""Runs that learn from what their models say, different in all that a run has of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raytune_ft.config.schema import Config
from tests.support.objectives import config_of, save_inputs

SHARED: dict[str, Any] = {
    "train.precision": "float64",
    "train.eval_every_examples": 14,
    "checkpoint.asynchronous": False,
    "method.name": "lora",
}
GRPO: dict[str, dict[str, Any]] = {
    "short": {"method.rank": 8, "train.max_examples": 28, "train.lr": 1e-2},
    "one step": {
        "train.batch_size": 5,
        "train.rollout": {"num_generations": 2, "max_completion_length": 5, "temperature": 0.8},
        "train.grpo": {"beta": 0.0},
        "train.max_examples": 23,
    },
    "sequences": {
        "method.rank": 2,
        "train.rollout": {
            "num_generations": 4,
            "max_completion_length": 11,
            "temperature": 0.8,
            "steps_per_generation": 3,
            "eval_completions": 2,
        },
        "train.grpo": {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "mask_truncated_completions": True,
            "beta": 0.2,
            "kl": "reward",
        },
        "train.max_examples": 42,
    },
    "late": {
        "seed": 3,
        "method.targets": ["q_proj", "down_proj"],
        "train.grpo": {"loss_type": "dr_grpo", "epsilon_high": 0.3},
        "train.max_examples": 21,
    },
}
PAIRS: dict[str, dict[str, Any]] = {
    "short": {"method.rank": 8, "train.max_examples": 28, "train.lr": 1e-2},
    "one step": {
        "train.rollout": {"num_generations": 2, "max_completion_length": 5},
        "train.dpo": {"beta": 0.5},
        "train.max_examples": 21,
    },
}
BY_OBJECTIVE = {"grpo": GRPO, "online_dpo": PAIRS}


def save_rolled_inputs(root: Path) -> Path:
    """`save_inputs`, and `held.jsonl` for validation, which no seed changes."""
    save_inputs(root)
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()[:9]]
    held = [{**row, "prompt": f"y{row['prompt']}"} for row in rows]
    (root / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return root


def configs_of(root: Path, objective: str, **changes: Any) -> dict[str, Config]:
    """By name; `changes` come last."""
    held = {"path": str(root / "held.jsonl"), "format": "prompt", "example_weight": "weight"}
    shared = {**SHARED, "data.validation": held}
    return {
        name: config_of(root, objective, {**shared, **own, **changes})
        for name, own in BY_OBJECTIVE[objective].items()
    }


def said(run_dir: Path) -> list[Any]:
    """The completions of a run, with their steps and rewards."""
    lines = (run_dir / "rollouts.jsonl").read_text().splitlines()
    return [(row["step"], row["completion"], row["rewards"]) for row in map(json.loads, lines)]
