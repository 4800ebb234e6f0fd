"""What is preferred is learnt, on pairs that a small real model tells and a hidden score ranks."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from raytune_ft.config.schema import Config
from raytune_ft.records import EvalMetrics
from tests.support.runs import Recorder, make_config, run

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]

TOKENS = 40
"""Of every answer, so that length tells nothing."""
WHO = ("girl", "boy", "dog", "cat", "bird", "bear", "bunny", "frog")
NAMES = ("Lily", "Tim", "Max", "Sue", "Ben", "Mia", "Tom", "Amy", "Spot", "Sam", "Anna", "Jack")
PROMPTS = [
    f"Once upon a time, there was a little {who} named {name}." for who in WHO for name in NAMES
]
EACH, HELD = 20, 16
"""Pairs for each prompt, and the prompts that nothing is trained on."""
SPREAD = 0.4
"""So much more of the score makes an answer e times as likely to be preferred."""
WORDS = ["play", "played", "playing", "friend", "friends", "fun", "park", "toy", "toys", "ball"]
LEARNT: dict[str, dict[str, Any]] = {
    "dpo": {"train.objective": "dpo", "train.lr": 3e-3},
    "ipo": {
        "train.objective": "dpo",
        "train.dpo": {"loss_type": "ipo", "beta": 1.0},
        "train.lr": 3e-3,
    },
    "simpo": {"train.objective": "simpo", "train.lr": 3e-3},
    "orpo": {"train.objective": "orpo", "train.orpo": {"beta": 3.0}, "train.lr": 1e-2},
    "kto": {"train.objective": "kto", "train.lr": 3e-3, "train.max_examples": 32 * 400},
}


def score(text: str) -> int:
    """The hidden score: how many words are about playing together."""
    return sum(word in WORDS for word in re.findall(r"[a-z']+", text.lower()))


@dataclass
class World:
    """Pairs by Bradley and Terry on the hidden score; who knows it agrees with the labels of
    validation as often as `ceiling` says.
    """

    model: Path
    pairs: Path
    held: Path
    ceiling: float
    base_scores: NDArray[np.float64]


def told(model: Any, tokenizer: Any, prompts: list[str], seed: int) -> list[str]:
    """A sampled answer to each prompt."""
    set_seed(seed)
    texts: list[str] = []
    for start in range(0, len(prompts), 256):
        # All prompts have one length within a batch of one prompt; pad on the left for the others.
        asked = tokenizer(
            prompts[start : start + 256], return_tensors="pt", padding=True, padding_side="left"
        )
        asked.pop("token_type_ids", None)
        made = model.generate(
            **asked, do_sample=True, min_new_tokens=TOKENS, max_new_tokens=TOKENS, top_k=0
        )
        texts += tokenizer.batch_decode(
            made[:, asked["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return texts


@pytest.fixture(scope="module")
def world(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    root, path = tmp_path_factory.mktemp("world"), shared_dir / "models" / "stories260k"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rng = np.random.default_rng(0)
    order = rng.permutation(len(PROMPTS))
    held = {PROMPTS[i] for i in order[:HELD]}
    asked = [prompt for prompt in PROMPTS for _ in range(EACH)]
    one, other = (told(model, tokenizer, asked, seed) for seed in (1, 2))
    files: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    sure = []
    for prompt, a, b in zip(asked, one, other, strict=True):
        wins = 1 / (1 + np.exp((score(b) - score(a)) / SPREAD))
        if score(a) == score(b):
            continue
        chosen, rejected = (a, b) if rng.random() < wins else (b, a)
        files[prompt in held].append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        if prompt in held:
            sure.append(max(wins, 1 - wins))
    names = {}
    for is_held, rows in files.items():
        names[is_held] = root / f"{'held' if is_held else 'pairs'}.jsonl"
        names[is_held].write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = np.array([score(text) for text in told(model, tokenizer, sorted(held) * 32, 3)], float)
    return World(path, names[False], names[True], float(np.mean(sure)), base)


def config_of(world: World, changes: dict[str, Any]) -> Config:
    kind = "unpaired" if changes["train.objective"] == "kto" else "preference"
    train, held = world.pairs, world.held
    if kind == "unpaired":
        train, held = (_unpaired(path) for path in (train, held))
    source = {"format": kind}
    return make_config(
        world.model,
        train,
        {
            "data.train.format": kind,
            "data.validation": {"path": str(held), **source},
            "data.separator": "",
            "method": {"name": "lora", "rank": 16, "alpha": 32.0},
            "train.batch_size": 32,
            "train.max_examples": 32 * 150,
            "train.eval_every_examples": 32 * 50,
            "checkpoint.every_examples": 32 * 50,
            "checkpoint.asynchronous": False,
            **changes,
        },
    )


def _unpaired(path: Path) -> Path:
    """Each answer by itself."""
    kept = path.with_suffix(".unpaired.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept.write_text(
        "".join(
            json.dumps(
                {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            )
            + "\n"
            for row in rows
            for name in ("chosen", "rejected")
        )
    )
    return kept


def trained(config: Config, run_dir: Path) -> EvalMetrics:
    heard = Recorder()
    assert run(config, run_dir, reporter=heard).status == "completed"
    return heard.evaluations[-1][0]


def test_a_reward_model_reaches_what_can_be_known(world: World, tmp_path: Path) -> None:
    changes = {"train.objective": "reward", "train.lr": 3e-3, "train.max_examples": 32 * 300}
    found = trained(config_of(world, changes), tmp_path / "run").figures
    report = json.loads((next((tmp_path / "cache").glob("*/report.json"))).read_text())
    longer = report["pairs"]["validation"]["longer_chosen"]
    reached = found["eval_reward_accuracy"]
    print(f"reward: accuracy {reached:.3f}, ceiling {world.ceiling:.3f}, longer {longer:.3f}")
    assert found["eval_reward_accuracy"] > world.ceiling - 0.06
    assert found["eval_reward_accuracy"] > longer + 0.1


@torch.no_grad()
def implied_accuracy(model: Any, base: Any, tokenizer: Any, pairs: Path) -> float:
    """Share of pairs whose chosen answer has gained more log-probability than the other."""
    right = []
    for row in map(json.loads, pairs.read_text().splitlines()):
        gains = []
        for answer in (row["chosen"], row["rejected"]):
            prompt = tokenizer(row["prompt"])["input_ids"]
            own = tokenizer(answer, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + own])
            logps = [one(ids).logits.log_softmax(-1)[0, :-1] for one in (model, base)]
            picked = [each.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum() for each in logps]
            gains.append(float(picked[0] - picked[1]))
        right.append(gains[0] > gains[1])
    return float(np.mean(right))


@pytest.mark.parametrize("name", LEARNT)
def test_what_is_preferred_is_told_more_often(world: World, tmp_path: Path, name: str) -> None:
    found = trained(config_of(world, LEARNT[name]), tmp_path / "run").figures
    last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.model), last)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    held = sorted({json.loads(line)["prompt"] for line in world.held.read_text().splitlines()})
    with torch.no_grad():
        scores = np.array([score(text) for text in told(model, tokenizer, held * 32, 3)], float)
    rng = np.random.default_rng(0)
    places = rng.integers(0, len(scores), (2000, len(scores)))
    gains = (scores - world.base_scores)[places].mean(1)
    low, high = np.quantile(gains, [0.025, 0.975])
    spread = world.base_scores.std()
    base = AutoModelForCausalLM.from_pretrained(world.model)
    reached = found.get("eval_reward_accuracy") or implied_accuracy(
        model, base, tokenizer, world.held
    )
    means = world.base_scores.mean(), scores.mean()
    print(f"{name}: accuracy {reached:.3f}, ceiling {world.ceiling:.3f}")
    print(
        f"score {means[0]:.2f} -> {means[1]:.2f}, {low / spread:.2f} to {high / spread:.2f} sd more"
    )
    assert reached > (0.65 if name == "kto" else 0.7)
    assert low > 0
