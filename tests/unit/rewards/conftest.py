"""A small run that really learned something, and a reward model that it is the base of."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from raytune_ft.promote.promote import promote
from tests.support.trained import Train, _one_thread, inputs, run_dir, train, trained

__all__ = ["_one_thread", "inputs", "run_dir", "train", "trained"]


def pairs(count: int, seed: int) -> list[dict[str, object]]:
    """The answer with more of the letter a is better; every third prompt is a conversation."""
    draw = random.Random(seed)
    rows: list[dict[str, object]] = []
    for number in range(count):
        answers = ["".join(draw.choices("abc", k=draw.randint(3, 9))) for _ in range(2)]
        if answers[0].count("a") == answers[1].count("a"):
            answers[0] += "aa"
        answers.sort(key=lambda text: text.count("a"), reverse=True)
        asked = f"say {draw.choice('defg')}"
        if number % 3 == 0:
            prompt: object = [{"role": "user", "content": asked}]
            chosen, rejected = ([{"role": "assistant", "content": one}] for one in answers)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        else:
            rows.append({"prompt": asked, "chosen": answers[0], "rejected": answers[1]})
    return rows


@pytest.fixture(scope="session")
def preferences(inputs: Path) -> Path:
    """pairs.jsonl and pairs_test.jsonl, beside the base."""
    for name, count, seed in (("pairs", 120, 0), ("pairs_test", 24, 1)):
        text = "".join(json.dumps(row) + "\n" for row in pairs(count, seed))
        (inputs / f"{name}.jsonl").write_text(text)
    return inputs


@pytest.fixture(scope="session")
def reward_run(preferences: Path, train: Train) -> Path:
    """A promoted run of `train.objective: reward`."""
    run = train(
        "rm",
        f"data.train={{path: {preferences}/pairs.jsonl, format: preference}}",
        f"data.test={{path: {preferences}/pairs_test.jsonl, format: preference}}",
        "train.objective=reward",
        "train.epochs=2",
    )
    promote(run)
    return run
