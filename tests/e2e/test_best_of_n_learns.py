"""A reward model that has learnt preferences picks the best of n answers, and the model learns
these: rejection sampling as a user runs it, measured by the hidden score behind the preferences.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.cli import run_command
from tests.e2e.test_preferences_learn import PROMPTS, TOKENS, WORDS, World, score, world

__all__ = ["world"]
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]

N, TIMES = 8, 4
"""Answers to a prompt, and how often each prompt is asked."""
CONFIG = """\
name: rm
model: {{path: {world.model}}}
data:
  train: {{path: {world.pairs}, format: preference}}
  validation: {{path: {world.held}, format: preference}}
  separator: ""
method: {{name: lora, rank: 16, alpha: 32.0}}
train:
  {{objective: reward, lr: 3e-3, batch_size: 32, max_examples: 6400, eval_every_examples: 3200}}
sampling: {{n: {n}, max_new_tokens: {tokens}}}
rewards:
  - {{name: model, label: rm, path: runs/rm/promoted/model, separator: ""}}
  - {{name: "own.py:gold", weight: 0.0}}
"""
LEARN = {
    "data.train": "{path: best.jsonl}",
    "data.validation": "0.1",
    "data.test": "{path: asked_held.jsonl}",
    "train.objective": "sft",
    "train.max_examples": "1920",
    "train.eval_every_examples": "480",
    "promote.metrics": "[loss, reward, win_rate:gold, win_rate_lc:gold, win_rate:rm]",
    "promote.metric": "reward:rm",
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_of_n_by_a_reward_model_are_worth_learning(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = CONFIG.format(world=world, n=N, tokens=TOKENS)
    Path("c.yaml").write_text(text)
    source = inspect.getsource(score)
    Path("own.py").write_text(
        f"import re\nWORDS = {WORDS!r}\n\n{source}\n"
        "def gold(prompt, reference, generated):\n    return score(generated)\n"
    )
    assert run_command(["train", "c.yaml", "rewards=[]"]) == 0
    assert run_command(["promote", "runs/rm"]) == 0
    held = {row["prompt"] for row in rows_of(world.held)}
    known = [prompt for prompt in PROMPTS if prompt not in held]
    for name, prompts, times in (("asked", known, TIMES), ("asked_held", sorted(held), 8)):
        rows = [{"prompt": prompt, "completion": " It was fun."} for prompt in prompts * times]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = ["train.objective=sft", "data.train={path: asked.jsonl}", "data.validation=0.1"]
    asked = ["--prompts", "asked.jsonl", "--best", "best.jsonl", *prompts]
    assert run_command(["sample", str(world.model), "--config", "c.yaml", *asked]) == 0
    samples = rows_of(Path("samples.jsonl"))
    every = np.array([row["scores"]["gold"] for row in samples]).reshape(-1, N)
    rm = np.array([row["scores"]["rm"] for row in samples]).reshape(-1, N)
    picked = np.take_along_axis(every, rm.argmax(1)[:, None], 1)[:, 0]
    gain, spread = picked.mean() - every.mean(), every.std()
    print(f"gold {every.mean():.3f}, of the best by rm {picked.mean():.3f}, sd {spread:.3f}")
    assert gain > 0.3 * spread

    learn = [f"{key}={value}" for key, value in LEARN.items()]
    assert run_command(["train", "c.yaml", "name=bon", *learn]) == 0
    assert run_command(["promote", "runs/bon", "--trust-run"]) == 0
    found: dict[str, Any] = json.loads(Path("runs/bon/promoted/evaluation.json").read_text())
    figures = ("reward:rm", "reward:gold", "win_rate:gold", "win_rate_lc:gold", "win_rate:rm")
    for name in figures:
        ends = found["differences"][name]["interval"]
        print(f"{name}: {found['base'][name]:.3f} -> {found['promoted'][name]:.3f}, {ends}")
    assert found["winner"] == "bon"
    assert found["differences"]["win_rate:gold"]["interval"][0] > 0
    assert found["promoted"]["win_rate:rm"] > 0.55
