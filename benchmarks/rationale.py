"""Do reasons help to learn answers? Distilling step by step on GSM8K, against answers alone.

stories260k learns the final numbers of problems, from the same rows, with the same prompts and the
same number of optimizer steps: as completions alone (`sft`), or with the worked solution as a
second task (`rationale`), whose examples are half of each batch of twice the size. Both are
measured by the loss and the exact match of the answers of the same held-out problems: those whose
solution is too long for a row are left out of both arms.

    python benchmarks/rationale.py SHARED_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.data.prepare import prepare_data
from raytune_ft.model.load import load_tokenizer
from raytune_ft.rundir import RunSpec
from raytune_ft.train.report import Silent
from raytune_ft.train.run import run_training

LENGTH = 400
HELD = 300


def main() -> None:
    """Train both arms for every seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    model = (args.shared / "models" / "stories260k").resolve()
    lines = (args.shared / "data" / "gsm8k" / "train.jsonl").read_text().splitlines()
    rows = short_rows([json.loads(line) for line in lines], model)[: args.rows + HELD]
    for name, part in (("train", rows[: args.rows]), ("held", rows[args.rows :])):
        write_rows(args.out / f"{name}.jsonl", part)
    print("| arm | seed | loss of answers before | after | exact match |\n|---|---|---|---|---|")
    for arm in ("sft", "rationale"):
        for seed in range(args.seeds):
            run_dir = args.out / f"{arm}-{seed}"
            run_dir.mkdir()
            config = config_of(arm, model, args.out, seed, args.epochs)
            tokenizer = load_tokenizer(config.model)
            data = prepare_data(config.data, tokenizer, 0, args.out / "cache")
            result = run_training(RunSpec(config, run_dir, data.path), "single", Silent())
            assert result.base is not None, result.error
            assert result.final is not None, result.error
            final = result.final
            losses = f"{result.base['eval_loss']:.3f} | {final.eval_loss:.3f}"
            print(
                f"| {arm} | {seed} | {losses} | {final.figures['eval_exact_match']:.3f} |",
                flush=True,
            )


def short_rows(rows: list[dict[str, str]], model: Path) -> list[dict[str, str]]:
    """Those that no arm drops."""
    tokenizer = load_tokenizer(ModelConfig(path=str(model)))
    texts = [f"[rationale] {row['question']}\n{row['answer']}" for row in rows]
    lengths = map(len, tokenizer(texts)["input_ids"])
    return [row for row, length in zip(rows, lengths, strict=True) if length < LENGTH]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """With the prompt of the answers' task, and reasons apart from the answer."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            reasons, _, answer = row["answer"].rpartition("####")
            written = {
                "question": row["question"],
                "labelled": f"[label] {row['question']}",
                "rationale": reasons.strip(),
                "answer": answer.strip(),
            }
            file.write(json.dumps(written) + "\n")


def config_of(arm: str, model: Path, out: Path, seed: int, epochs: int) -> Config:
    """One arm."""
    source: dict[str, Any] = {"completion": "answer"}
    if arm == "rationale":
        source |= {"format": "rationale", "prompt": "question", "rationale": "rationale"}
    else:
        source |= {"prompt": "labelled"}
    return Config.model_validate(
        {
            "name": "run",
            "seed": seed,
            "model": {"path": str(model)},
            "method": {"name": "full"},
            "data": {
                "train": {**source, "path": str(out / "train.jsonl")},
                "validation": {**source, "path": str(out / "held.jsonl")},
                "max_length": LENGTH,
                "too_long": "drop",
                "max_bad_fraction": 0.5,
            },
            "train": {
                "objective": arm,
                "batch_size": 32 if arm == "rationale" else 16,
                "lr": 1e-3,
                "precision": "float32",
                "epochs": epochs,
                "eval_every_examples": 10**9,
            },
        }
    )


if __name__ == "__main__":
    main()
