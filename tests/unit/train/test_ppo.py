"""Whole runs of PPO: what they learn, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import Config
from tests.support.models import save_tiny_llama
from tests.support.objectives import config_of, save_inputs
from tests.support.runs import final_weights, make_config, metrics, run

REWARDS = """
def vowels(completions, **columns):
    return [sum(letter in "aeiou" for letter in one) for one in completions]


def asked(completions, prompts, **columns):
    return [float(one[1] == "a") for one in prompts]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ppo")
    save_tiny_llama(root / "model")
    (root / "own.py").write_text(REWARDS)
    rows = [{"prompt": f"x{'az'[i % 2]}{chr(97 + i // 4)}"} for i in range(80)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def learning(folder: Path, reward: str, changes: dict[str, Any]) -> Config:
    return make_config(
        folder / "model",
        folder / "rows.jsonl",
        {
            "data.train.format": "prompt",
            "train.objective": "ppo",
            "train.batch_size": 16,
            "train.lr_schedule": "constant",
            "train.warmup_fraction": 0.0,
            "train.weight_decay": 0.0,
            "train.eval_every_examples": 100_000,
            "checkpoint.every_examples": 100_000,
            "rewards": [f"{folder / 'own.py'}:{reward}"],
            **changes,
        },
    )


# The other seed is to show that this one is no luck.
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_reward_is_learnt(folder: Path, tmp_path: Path, seed: int) -> None:
    """Vowels among eight letters, of which the untrained model says almost none."""
    rollout = {"num_generations": 4, "max_completion_length": 8, "num_iterations": 2}
    changes = {"seed": seed, "train.max_examples": 16 * 60, "train.rollout": rollout}
    assert run(learning(folder, "vowels", changes), tmp_path / "run").status == "completed"
    found = [line["eval_reward"] for line in metrics(tmp_path / "run") if "eval_reward" in line]
    print(f"seed {seed}: {found}")
    assert found[0] < 1
    assert found[-1] > 5


@pytest.mark.parametrize(("detached", "low", "high"), [(False, 0.9, 1.0), (True, 0.3, 0.6)])
def test_the_critic_learns_what_prompts_are_worth(
    folder: Path, tmp_path: Path, detached: bool, low: float, high: float
) -> None:
    """The reward goes by the prompt alone: values can know it, and no answer can change it. What a
    linear map of untrained states cannot say, it says once the states are trained for it. Without
    that, the policy hardly moves: its advantages are noise, and would carry the states anywhere.
    """
    ppo = {
        "kl_coef": 0.0,
        "vf_coef": 1.0,
        "lam": 1.0,
        "whiten_advantages": False,
        "cliprange_value": None,
        "detach_values": detached,
        "value_lr_ratio": 1000.0 if detached else 1.0,
    }
    rollout = {"num_generations": 1, "max_completion_length": 4, "num_iterations": 4}
    changes = {
        "train.max_examples": 16 * 80,
        "train.lr": 1e-5 if detached else 1e-2,
        "train.lr_schedule": "linear",
        "train.ppo": ppo,
        "train.rollout": rollout,
    }
    assert run(learning(folder, "asked", changes), tmp_path / "run").status == "completed"
    known = [line["explained_variance"] for line in metrics(tmp_path / "run")[1:-1]]
    print(f"detached {detached}: {known[::4]}")
    assert known[0] == pytest.approx(0)
    assert low < sum(known[-12:]) / 12 < high


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_exported_has_no_critic(tmp_path: Path, method: str) -> None:
    """Plain PEFT or transformers load it, without a weight too many."""
    inputs = save_inputs(tmp_path / "inputs")
    changes = {"method": {"name": method} | ({"rank": 4} if method == "lora" else {})}
    assert run(config_of(inputs, "ppo", changes), tmp_path / "run").status == "completed"
    trained = final_weights(tmp_path / "run")
    assert trained["value_head.weight"].shape == (1, 32)
    assert trained["value_head.weight"].abs().min() > 0
    (last,) = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1:]
    for file in last.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert not [name for name in tensors.keys() if "value_head" in name]  # noqa: SIM118
    if method == "lora":
        base = AutoModelForCausalLM.from_pretrained(inputs / "decoder")
        loaded: Any = PeftModel.from_pretrained(base, str(last))
        own = dict(loaded.named_parameters())
        adapter = {name: value for name, value in own.items() if "lora" in name}
        assert len(adapter) == len(trained) - 2
        assert all(torch.equal(value, trained[name]) for name, value in adapter.items())
    else:
        loaded, report = AutoModelForCausalLM.from_pretrained(last, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        own = dict(loaded.named_parameters())
        assert all(torch.equal(value, trained[name]) for name, value in own.items())
