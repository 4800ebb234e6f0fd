"""What a tenth of general text in the mix keeps of what a model knew.

stories260k learns GSM8K with every weight, with and without replay of text that it writes itself.
All runs see the same number of GSM8K examples, so replay is paid for on top.

    python benchmarks/replay.py SHARED_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.model.load import load_tokenizer
from raytune_ft.rundir import RunSpec
from raytune_ft.train.report import Silent
from raytune_ft.train.run import run_training

GENERAL, HELD = 400, 100
SHARES = (0.0, 0.02, 0.1, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--maths", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    model = args.shared / "models" / "stories260k"
    write_stories(model, args.out)
    lines = (args.shared / "data" / "gsm8k" / "train.jsonl").read_text().splitlines(keepends=True)
    (args.out / "maths.jsonl").write_text("".join(lines[: args.maths]))
    (args.out / "held-maths.jsonl").write_text("".join(lines[-200:]))
    print("share of replay | seed | GSM8K before, after | stories before, after")
    for share in SHARES:
        for seed in range(args.seeds):
            base, final = train(model, args.out, share, seed, args.maths)
            figures = [f"{base[name]:.3f}, {final[name]:.3f}" for name in ("maths", "stories")]
            print(f"{share:.2f} | {seed} | {' | '.join(figures)}", flush=True)


def write_stories(model: Path, out: Path) -> None:
    """Samples of the model itself, which are what it knows."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    torch.manual_seed(0)
    start = torch.full((GENERAL + HELD, 1), tokenizer.bos_token_id)
    made = network.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=128,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        pad_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    for name, part in (("stories", texts[:GENERAL]), ("held-stories", texts[GENERAL:])):
        rows = (json.dumps({"text": text.strip()}) + "\n" for text in part if text.strip())
        (out / f"{name}.jsonl").write_text("".join(rows))


def train(
    model: Path, out: Path, share: float, seed: int, maths: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Losses by source before and after one pass over the maths."""
    gsm8k = {"name": "maths", "prompt": "question", "completion": "answer"}
    stories = {"name": "stories", "format": "text"}
    plain: dict[str, Any] = {
        "name": "run",
        "seed": seed,
        "model": {"path": str(model)},
        "method": {"name": "full"},
        "data": {
            "train": [
                {**gsm8k, "path": str(out / "maths.jsonl"), "weight": 1 - share},
                {**stories, "path": str(out / "stories.jsonl"), "weight": share},
            ],
            "validation": [
                {**gsm8k, "path": str(out / "held-maths.jsonl")},
                {**stories, "path": str(out / "held-stories.jsonl")},
            ],
            "max_length": 256,
            "max_bad_fraction": 0.5,  # GSM8K prompts that fill 256 tokens of this vocabulary
        },
        "train": {
            "batch_size": 16,
            "lr": 1e-3,
            "precision": "float32",
            "max_examples": round(maths / (1 - share)),
            "eval_every_examples": 10**9,
        },
    }
    return run_once(Config.model_validate(plain), out / f"share-{share}-seed-{seed}")


def run_once(config: Config, run_dir: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Losses by source before and after a run."""
    run_dir.mkdir()
    data = prepare_data(config.data, load_tokenizer(config.model), 0, run_dir.parent / "cache")
    result = run_training(RunSpec(config, run_dir, data.path), "single", Silent())
    assert result.base is not None, result.error
    assert result.final is not None, result.error
    return result.base["eval_loss_by_source"], result.final.eval_loss_by_source


if __name__ == "__main__":
    main()
