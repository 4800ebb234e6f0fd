"""Every method once on GSM8K with a small real model: what it learns, trains and takes.

python benchmarks/methods.py --shared ../shared --out methods.md
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

from raytune_ft.config.methods import METHODS
from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.estimate.parameters import build_shell
from raytune_ft.model.load import load_tokenizer
from raytune_ft.rundir import RunSpec
from raytune_ft.train.report import Silent
from raytune_ft.train.run import run_training

ROWS = 640  # of which a fifth is validation
ARMS: dict[str, tuple[float, dict[str, Any]]] = {
    "full": (1e-3, {"name": "full"}),
    "freeze, last 2 blocks": (1e-3, {"name": "freeze", "last": 2}),
    "freeze, gradually": (1e-3, {"name": "freeze", "unfreeze_every_examples": 96}),
    "lora": (3e-3, {"name": "lora", "rank": 16}),
    "lora, dora": (3e-3, {"name": "lora", "rank": 16, "dora": True}),
    "lora, lr_ratio 4": (1.5e-3, {"name": "lora", "rank": 16, "lr_ratio": 4.0}),
    "lora, pissa": (1e-3, {"name": "lora", "rank": 16, "init": "pissa"}),
    "lora, olora": (1e-3, {"name": "lora", "rank": 16, "init": "olora"}),
    "qlora": (3e-3, {"name": "qlora", "rank": 16}),
    "ia3": (2e-2, {"name": "ia3"}),
    "vera": (2e-2, {"name": "vera"}),
    "oft": (3e-3, {"name": "oft"}),
}
"""A rate that suits the method, and its keys; a method without a line has its defaults at 3e-3."""


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="holds models/ and data/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="arms, by their names")
    options = parser.parse_args()
    known = {method["name"] for _, method in ARMS.values()}
    arms = ARMS | {name: (3e-3, {"name": name}) for name in METHODS if name not in known}
    lines = [
        "| method | lr | trained weights | eval loss before | after | seconds |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        rows = Path(temporary) / "rows.jsonl"
        with (options.shared / "data" / "gsm8k" / "train.jsonl").open() as source:
            rows.write_text("".join(itertools.islice(source, ROWS)))
        for name, (lr, method) in arms.items():
            if not options.only or name in options.only:
                model = options.shared / "models" / "stories260k"
                lines.append(_line(name, lr, method, model, rows))
                print(lines[-1], flush=True)
                options.out.write_text("\n".join(lines) + "\n")


def _line(name: str, lr: float, method: dict[str, Any], model: Path, rows: Path) -> str:
    config = Config.model_validate(
        {
            "name": "run",
            "model": {"path": str(model.resolve())},
            "method": method,
            "data": {
                "train": {
                    "path": str(rows),
                    "format": "prompt_completion",
                    "prompt": "question",
                    "completion": "answer",
                },
                "validation": 0.2,
                "max_length": 256,
                "max_bad_fraction": 0.1,  # questions that leave no room for an answer
            },
            "train": {"batch_size": 8, "lr": lr, "precision": "float32", "epochs": 1.0},
        }
    )
    run_dir = rows.parent / name.replace(" ", "-")
    run_dir.mkdir()
    data = prepare_data(config.data, load_tokenizer(config.model), 0, rows.parent / "cache")
    started = time.perf_counter()
    result = run_training(RunSpec(config, run_dir, data.path), "single", Silent())
    took = time.perf_counter() - started
    assert result.status == "completed", result.error
    assert result.base
    assert result.final
    trained = build_shell(config.model, config.method, config.train.precision).trained
    losses = f"{result.base['eval_loss']:.3f} | {result.final.eval_loss:.3f}"
    return f"| {name} | {lr:g} | {trained:,} | {losses} | {took:.0f} |"


if __name__ == "__main__":
    main()
