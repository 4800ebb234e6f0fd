"""GRPO and PPO learn what they are rewarded for, by a small real model on two cores, and a reward
that can be had cheaply is had cheaply. The bars are of the seeds in benchmarks/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.load import dump_yaml
from raytune_ft.config.schema import Config
from raytune_ft.layout import CONFIG
from raytune_ft.report.collect import collect
from raytune_ft.report.write import overoptimised
from tests.support.commands import command, run_process
from tests.support.runs import make_config, metrics, run

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]

SEEN = (
    "dog",
    "cat",
    "bird",
    "bunny",
    "frog",
    "mouse",
    "pig",
    "cow",
    "horse",
    "fox",
    "tiger",
    "rabbit",
    "squirrel",
    "turtle",
    "elephant",
    "puppy",
    "butterfly",
    "bee",
)
HELD = ("bear", "fish", "lion", "kitten", "duck", "monkey")
"""Animals that no prompt of training names."""
NAMES = ["Lily", "Tim", "Max", "Sue", "Ben", "Mia", "Tom", "Amy", "Spot", "Sam", "Anna", "Jack"]
REWARDS = '''
import re


def named(completions, animal, **columns):
    """Whether the story goes on about its animal."""
    return [float(re.search(rf"\\b{a}", one) is not None) for one, a in zip(completions, animal)]


def happy(completions, **columns):
    """What can be hacked: how often the word is there."""
    return [float(len(re.findall(r"\\bhappy\\b", one))) for one in completions]


def meant(completions, **columns):
    """What the word's count stands for: the story has it, and not all the time."""
    return [float(1 <= len(re.findall(r"\\bhappy\\b", one)) <= 2) for one in completions]
'''
BATCH, EACH = 8, 8


def config_of(
    shared_dir: Path,
    root: Path,
    seed: int,
    steps: int,
    rewards: list[Any],
    changes: Mapping[str, Any],
    batch: int = BATCH,
) -> Config:
    """GRPO with 8 completions of each prompt, but for the `changes`."""
    (root / "score.py").write_text(REWARDS)
    files = {held: root / f"{'held' if held else 'train'}.jsonl" for held in (False, True)}
    for held, file in files.items():
        rows = [
            {"prompt": f"Once upon a time, there was a little {a} named {n}.", "animal": a}
            for a, n in product(HELD if held else SEEN, NAMES)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_config(
        shared_dir / "models" / "stories260k",
        files[False],
        {
            "seed": seed,
            "data.train.format": "prompt",
            "data.validation": {"path": str(files[True]), "format": "prompt"},
            "method": {"name": "lora", "rank": 16, "alpha": 32.0},
            "train.objective": "grpo",
            "rewards": rewards,
            "train.rollout": {"num_generations": EACH, "max_completion_length": 48},
            "train.batch_size": batch,
            "train.max_examples": batch * steps,
            "train.eval_every_examples": batch * 10,
            "train.lr": 1e-3,
            "train.lr_schedule": "constant",
            "train.warmup_fraction": 0.0,
            "train.weight_decay": 0.0,
            "checkpoint.every_examples": batch * steps,
            **changes,
        },
    )


def curves(config: Config, run_dir: Path) -> list[dict[str, float]]:
    """The figures of each evaluation, which are on the held-out animals."""
    assert run(config, run_dir).status == "completed"
    found = [line for line in metrics(run_dir) if "eval_loss" in line]
    for line in found:
        shown = {k: v for k, v in line.items() if k.startswith("eval_") and isinstance(v, float)}
        print(line["step"], " ".join(f"{name[5:]} {value:.3f}" for name, value in shown.items()))
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_the_recipe_learns_to_be_right(tmp_path: Path, seed: int) -> None:
    """To the letter, on words that it was never asked about, and without seeing an answer."""
    recipe = ("train", "jobs/quickstart_grpo.yaml", f"storage={tmp_path}", "name=run")
    done = run_process(command(*recipe, f"seed={seed}"), 1500)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    right = [line["eval_reward"] for line in lines if "eval_loss" in line]
    seconds = max(line.get("wall_s", 0.0) for line in lines)
    print(f"right answers {right}, {seconds:.0f} s")
    assert right[0] < 0.1
    assert right[-1] > 0.6


@pytest.mark.parametrize("seed", [0, 1])
def test_a_story_goes_on_about_its_animal(shared_dir: Path, tmp_path: Path, seed: int) -> None:
    rewards = [f"{tmp_path / 'score.py'}:named"]
    config = config_of(shared_dir, tmp_path, seed, 50, rewards, {})
    rewarded = [line["eval_reward"] for line in curves(config, tmp_path / "run")]
    assert rewarded[0] < 0.3
    assert rewarded[-1] > 0.85


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_learns_the_same_from_one_completion_of_each_prompt(
    shared_dir: Path, tmp_path: Path, seed: int
) -> None:
    rewards = [f"{tmp_path / 'score.py'}:named"]
    changes = {
        "train.objective": "ppo",
        "train.rollout": {"num_generations": 1, "max_completion_length": 48},
        "train.ppo": {"kl_coef": 0.02},
        "train.lr_schedule": "linear",
    }
    config = config_of(shared_dir, tmp_path, seed, 30, rewards, changes, BATCH * EACH)
    rewarded = [line["eval_reward"] for line in curves(config, tmp_path / "run")]
    assert rewarded[0] < 0.3
    assert rewarded[-1] > 0.75


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("beta", "hacked"), [(0.0, True), (0.1, True), (1.0, False)])
def test_a_reward_is_hacked_where_nothing_holds_it(
    shared_dir: Path, tmp_path: Path, seed: int, beta: float, hacked: bool
) -> None:
    """The word comes again and again, and the report names the witnesses: that phrases repeat, and
    that the word is there once or twice. A KL term of 0.1 does not prevent it, and one of 1 does.
    """
    score = tmp_path / "score.py"
    witnesses = [{"name": "repetition", "weight": 0.0}, {"name": f"{score}:meant", "weight": 0.0}]
    changes = {"train.grpo": {"beta": beta}}
    config = config_of(shared_dir, tmp_path, seed, 30, [f"{score}:happy", *witnesses], changes)
    lines = curves(config, tmp_path / "run")
    trained, repeated, meant = (
        [line[f"eval_reward:{name}"] for line in lines] for name in ("happy", "repetition", "meant")
    )
    assert all(line["eval_reward"] == line["eval_reward:happy"] for line in lines)
    (tmp_path / "run" / CONFIG).write_text(dump_yaml(config))
    said = " ".join(overoptimised(collect(tmp_path / "run")))
    if hacked:
        assert trained[-1] > 3 * trained[0] + 1
        assert repeated[-1] < repeated[0] - 0.4
        assert max(meant) > meant[-1] + 0.2
        assert "while repetition, which is only watched" in said
        assert "while meant, which is only watched" in said
    else:
        assert trained[0] < trained[-1] < 1
        assert repeated[-1] > repeated[0] - 0.05
        assert meant[-1] > meant[0]
        assert not said
