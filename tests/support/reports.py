"""A sweep's directory as it is left, written by hand, so that every part of a report has facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EVIL = "<script>document.title='owned'</script>"
CONFIG = """
name: letters
storage: runs
model: {path: "builtin:tiny"}
data: {train: {path: train.jsonl}}
search:
  scheduler: {name: asha, grace_examples: 100, reduction_factor: 2}
  space:
    train.lr: {log_uniform: [1e-4, 1e-2]}
    method.rank: {choice: [4, 8]}
    method.targets: {choice: [all-linear, [q_proj, v_proj]]}
promote: {merge: auto}
"""


def candidate(name: str, simplicity: int, loss: float, best: float, **settings: Any) -> Any:
    gap = loss - best
    return {
        "name": name,
        "simplicity": simplicity,
        "figures": {"eval_loss": loss, "retention_kl": 0.5 * simplicity},
        "difference": gap or None,
        "interval": [gap - 0.1, gap + 0.1] if gap else None,
        "settings": settings,
    }


def make_sweep_dir(directory: Path) -> Path:
    """Six trials, two of them pruned, and a promotion of four candidates."""
    trials = []
    for number in range(6):
        trial = directory / "trials" / f"trial-{number:03d}"
        trial.mkdir(parents=True)
        pruned = number in (1, 4)
        ends = (0, 100) if pruned else (0, 100, 200, 300)
        lines = [
            {"step": e // 10, "examples": e, "eval_loss": 3.0 if e == 0 else 1 + number / (e / 50)}
            for e in ends
        ]
        lines.insert(1, {"step": 1, "examples": 10, "loss": 2.5, "wall_s": 1.0})
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"half": '
        (trial / "metrics.jsonl").write_text(text)
        trials.append(
            {
                "id": trial.name,
                "params": {
                    "train.lr": 10 ** (-2 - number / 4),
                    "method.rank": 4 if number % 2 else 8,
                    "method.targets": ["q_proj", "v_proj"] if number > 2 else "all-linear",
                },
                "status": "pruned" if pruned else "completed",
                "eval_loss": lines[-1]["eval_loss"],
                "value": lines[-1]["eval_loss"],
                "examples": ends[-1],
                "wall_s": 1.5 * len(ends),
                "error": EVIL if number == 5 else None,
            }
        )
    (directory / "config.yaml").write_text(CONFIG + f"# {EVIL}\n")
    result = {
        "status": "completed",
        "best": {"trial": "trial-000", "eval_loss": 1.0},
        "base": {"eval_loss": 3.0},
        "trials": trials,
        "makespan_s": 12.5,
        "execution": "packed",
    }
    (directory / "result.json").write_text(json.dumps(result))
    source = {"name": EVIL, "rows": 100, "sha256": "ab" * 32}
    (directory / "data.json").write_text(json.dumps({"sources": {"train": source}}))
    (directory / "promoted").mkdir()
    evaluation = {
        "split": "test",
        "examples": 40,
        "base": {"eval_loss": 3.0, "exact_match": 0.0, "retention_kl": 0.0},
        "promoted": {"eval_loss": 1.1, "exact_match": 0.5, "retention_kl": 0.5},
        "differences": {
            "eval_loss": {"difference": -1.9, "interval": [-2.1, -1.7]},
            "exact_match": {"difference": 0.5, "interval": [-0.1, 0.6]},
            "retention_kl": {"difference": 0.5, "interval": [0.4, 0.6]},
        },
        "looks": 1,
        "reference": "base",
        "verdict": "promoted is better than base",
        "metric": "eval_loss",
        "mode": "min",
        "winner": "trial-000",
        "tied": True,
        "improved": True,
        "confidence": 0.95,
        "validation_examples": 20,
        "candidates": [
            candidate("base", 0, 3.0, 0.95),
            candidate("trial-000", 1, 1.0, 0.95),
            candidate("wise_ft-0.5", 2, 1.6, 0.95, alpha=0.5),
            candidate("uniform_soup", 3, 0.95, 0.95),
        ],
        "samples": [
            {
                "prompt": f"say {EVIL}",
                "reference": "aa",
                "base": '"><img src=x onerror=alert(1)>',
                "promoted": "aa",
            }
        ],
    }
    (directory / "promoted" / "evaluation.json").write_text(json.dumps(evaluation))
    return directory
