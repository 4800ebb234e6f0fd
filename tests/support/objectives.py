"""A config for every objective over the same tiny rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from raytune_ft.config.schema import Config
from tests.support.models import save_tiny_encoder, save_tiny_llama
from tests.support.runs import make_config

SHORT = {"train.max_examples": 7 * 10 - 3, "checkpoint.every_examples": 21}
CASES: dict[str, dict[str, Any]] = {
    "sft": {"data.train.example_weight": "weight", "train.label_smoothing": 0.1},
    "clm": {"data.train.format": "text", "data.max_length": 12, "data.chunk": {"overlap": 3}},
    "classification": {"data.train.format": "classification", "train.class_weights": "balanced"},
    "rationale": {"data.train.format": "rationale", "train.rationale_weight": 0.3},
    "kd": {"train.kd": {"divergence": "reverse", "temperature": 2.0, "weight": 0.7}},
    "dpo": {
        "data.train.format": "preference",
        "data.train.example_weight": "weight",
        "train.dpo": {
            "loss_type": ["sigmoid", "ipo", "sft"],
            "loss_weights": [1.0, 0.01, 0.3],
            "beta": 0.3,
            "ld_alpha": 0.5,
        },
    },
    "orpo": {"data.train.format": "preference", "train.orpo": {"beta": 0.5}},
    "kto": {
        "data.train.format": "unpaired",
        "data.train.label": "liked",
        "data.train.example_weight": "weight",
        "train.kto": {"undesirable_weight": 0.7, "beta": 0.3},
    },
    "reward": {
        "data.train.format": "preference",
        "data.train.margin": "weight",
        "train.reward": {"center_rewards_coefficient": 0.1},
    },
    "simpo": {"data.train.format": "preference", "train.simpo": {"cpo_alpha": 0.2}},
    "grpo": {
        "data.train.format": "prompt",
        "data.train.example_weight": "weight",
        "train.rollout": {
            "num_generations": 3,
            "max_completion_length": 8,
            "temperature": 0.8,
            "steps_per_generation": 2,
            "num_iterations": 2,
        },
        "train.grpo": {"beta": 0.1},
    },
    "online_dpo": {
        "data.train.format": "prompt",
        "data.train.example_weight": "weight",
        "train.rollout": {
            "num_generations": 3,
            "max_completion_length": 6,
            "steps_per_generation": 2,
        },
        "train.dpo": {"loss_type": ["sigmoid", "sft"], "beta": 0.3},
    },
    "ppo": {
        "data.train.format": "prompt",
        "data.train.example_weight": "weight",
        "train.rollout": {
            "num_generations": 2,
            "max_completion_length": 8,
            "temperature": 0.8,
            "steps_per_generation": 2,
            "num_iterations": 2,
        },
        "train.ppo": {"kl_coef": 0.1, "gamma": 0.95, "vf_coef": 0.5},
    },
    "grpo sequence": {
        "data.train.format": "prompt_completion",
        "train.rollout": {"num_generations": 4, "max_completion_length": 6},
        "train.grpo": {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "scale_rewards": "batch",
            "mask_truncated_completions": True,
            "drop_zero_std": True,
            "beta": 0.05,
            "kl": "reward",
        },
    },
}
"""By objective, or objective and case."""
SCORE = """
def vowels(completions, weight, **columns):
    return [sum(one.count(letter) for letter in "aeiou") + 0.1 * w
            for one, w in zip(completions, weight)]


def short(completions, **columns):
    return [None if one.startswith("b") else -len(one) for one in completions]
"""


def save_inputs(root: Path, count: int = 40) -> Path:
    """`decoder`, `encoder`, `teacher` and `rows.jsonl` with every column that a case needs."""
    root.mkdir(parents=True, exist_ok=True)
    save_tiny_llama(root / "decoder")
    save_tiny_llama(root / "teacher", seed=1)
    save_tiny_encoder(root / "encoder")
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghij ,."))

    def text(low: int, high: int) -> str:
        return "x" + "".join(rng.choice(letters, int(rng.integers(low, high))))

    rows = [
        {
            "prompt": text(1, 20),
            "completion": text(1, 20),
            "rationale": text(1, 20),
            "chosen": text(1, 20),
            "rejected": text(1, 20),
            "text": text(1, 30),
            "other": text(1, 12),
            "liked": number % 3 > 0,
            "label": "abc"[number % 3],
            "labels": ["a", "b", "c"][: number % 4],
            "numbers": [float(rng.normal()), float(rng.normal())],
            "weight": [0, 0.5, 1, 2.5][number % 4],
        }
        for number in range(count)
    ]
    (root / "score.py").write_text(SCORE)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def config_of(
    root: Path, objective: str, changes: dict[str, Any], model: str = "decoder"
) -> Config:
    """A short run; `changes` come last."""
    case = {"train.objective": objective.split()[0], **SHORT, **CASES[objective]}
    if objective == "kd":
        case["train.kd"] = {**case["train.kd"], "teacher": str(root / "teacher")}
    if "train.rollout" in case:
        short = {"name": f"{root / 'score.py'}:short", "weight": 0.1}
        case["rewards"] = [f"{root / 'score.py'}:vowels", short]
    return make_config(root / model, root / "rows.jsonl", {**case, **changes})
