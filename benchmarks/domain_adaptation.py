"""A story model learns Shakespeare: perplexity there, and what it forgets of its stories.

stories260k sees raw text under `train.objective: clm`, with every weight and with LoRA, with and
without a tenth of stories that it writes itself in the mix.

    python benchmarks/domain_adaptation.py SHARED_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from replay import run_once, write_stories

from raytune_ft.config.schema import Config

METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "full": (1e-3, {"name": "full"}),
    "lora": (3e-3, {"name": "lora", "rank": 16}),
}


def main() -> None:
    """Train each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, default=2000, help="chunks of 256 tokens")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    model = (args.shared / "models" / "stories260k").resolve()
    write_stories(model, args.out)
    text = (args.shared / "data" / "tinyshakespeare" / "input.txt").read_text()
    held = int(len(text) * 0.95)
    (args.out / "plays.txt").write_text(text[:held])
    (args.out / "held-plays.txt").write_text(text[held:])
    print("| method | replay | perplexity on Shakespeare | on stories |\n|---|---|---|---|")
    for name, (lr, method) in METHODS.items():
        for share in (0.0, 0.1):
            config = config_of(model, args.out, method, lr, share, args.examples)
            base, final = run_once(config, args.out / f"{name}-{share}")
            cells = [
                f"{math.exp(base[source]):.2f} -> {math.exp(final[source]):.2f}"
                for source in ("plays", "stories")
            ]
            print(f"| {name} | {share} | {' | '.join(cells)} |", flush=True)


def config_of(
    model: Path, out: Path, method: dict[str, Any], lr: float, share: float, examples: int
) -> Config:
    """Chunks of the plays, with a share of stories; validation has both."""
    plays = {"name": "plays", "format": "text", "rows": "file"}
    stories = {"name": "stories", "format": "text"}
    return Config.model_validate(
        {
            "name": "run",
            "model": {"path": str(model)},
            "method": method,
            "data": {
                "train": [
                    {**plays, "path": str(out / "plays.txt"), "weight": 1 - share},
                    {**stories, "path": str(out / "stories.jsonl"), "weight": share},
                ],
                "validation": [
                    {**plays, "path": str(out / "held-plays.txt")},
                    {**stories, "path": str(out / "held-stories.jsonl")},
                ],
                "max_length": 256,
                "chunk": {"overlap": 0},
            },
            "train": {
                "objective": "clm",
                "batch_size": 16,
                "lr": lr,
                "precision": "float32",
                "max_examples": examples,
                "eval_every_examples": 10**9,
            },
        }
    )


if __name__ == "__main__":
    main()
