"""DPO on a CPU: ours against TRL's `DPOTrainer`, and 12 trials of a search.

    python benchmarks/preferences.py --shared ../shared
    python benchmarks/preferences.py --shared ../shared --cell sweep --rounds 1
    python benchmarks/preferences.py --shared ../shared --cell short-sweep --rounds 1

Pairs are made of GSM8K: the answer of the row is chosen, that of the next row is rejected.

`step` (24M Llama with random weights, LoRA of rank 16, 2 threads): non-pad tokens of both answers
per second of training alone, and the peak of the process's memory. TRL computes its reference
beforehand, as ours does; `sft` is our supervised run over the same tokens, each answer an example.
Which of TRL's arms is its best depends on the CPU: without AVX-512 bfloat16 is slow, and so
`trl-float32` is.
`sweep` (stories260k): seconds of 12 trials over beta, lr and rank; ours is the command `raytune-ft
sweep` from start to end, with Ray, promotion and report; TRL trains them one after another in one
process, on one reference. `short-sweep` is the same on pairs of calculator steps (`48/2=`, `24`)
and on eight times as many. Arms take turns, each in a process of its own. It needs `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from sweep_makespan import short_rows, whole_rows
from train_throughput import ALPHA, LR, RANK, THREADS, WARMUP_STEPS, build_base

BATCH, MAX_LENGTH, BETA = 8, 512, 0.1
SWEEP_BATCH, SWEEP_LENGTH = 16, 256
TRIAL_PAIRS = {"sweep": 640, "short-sweep": 5120}


def make_pairs(shared: Path, folder: Path, cell: str, count: int) -> None:
    """`pairs.jsonl`, and `answers.jsonl` with each answer in a row of its own."""
    rows = short_rows(shared) if cell == "short-sweep" else whole_rows(shared)
    if cell == "sweep":
        rows = [row for row in rows if len(row["prompt"]) + len(row["completion"]) <= 300]
    different = (two for two in pairwise(rows) if two[0]["completion"] != two[1]["completion"])
    files = (folder / "pairs.jsonl", folder / "answers.jsonl")
    with files[0].open("w") as pairs, files[1].open("w") as alone:
        for row, other in islice(different, count):
            answers = {"chosen": row["completion"], "rejected": other["completion"]}
            pairs.write(json.dumps({"prompt": row["prompt"], **answers}) + "\n")
            for answer in answers.values():
                alone.write(json.dumps({"prompt": row["prompt"], "completion": answer}) + "\n")


def run_ours(base: Path, objective: str) -> dict[str, float]:
    """The loop of this package, as `raytune-ft train` runs it under strategy single."""
    import torch

    from raytune_ft.config.schema import Config
    from raytune_ft.data.prepare import prepare_data
    from raytune_ft.evaluate.precompute import referenced
    from raytune_ft.model.load import load_tokenizer
    from raytune_ft.rundir import RunSpec
    from raytune_ft.train.report import Silent
    from raytune_ft.train.run import run_training

    torch.set_num_threads(THREADS)
    run_dir = base.parent / f"ours-{os.getpid()}"
    run_dir.mkdir()
    pairs = objective == "dpo"
    config = Config.model_validate(
        {
            "name": "throughput",
            "model": {"path": str(base)},
            "method": {"name": "lora", "rank": RANK, "alpha": float(ALPHA)},
            "data": {
                "train": {
                    "path": str(base.parent / ("pairs.jsonl" if pairs else "answers.jsonl")),
                    "format": "preference" if pairs else "prompt_completion",
                },
                "separator": "",
                "validation": 0.02,
                "max_length": MAX_LENGTH,
            },
            "train": {
                "objective": objective,
                "batch_size": BATCH if pairs else 2 * BATCH,
                "lr": LR,
                "eval_every_examples": 10**9,
            },
            "checkpoint": {"every_examples": 10**9},
        }
    )
    prepared = prepare_data(config.data, load_tokenizer(config.model), 0, base.parent / "cache")
    begun = time.perf_counter()
    prepared = referenced(config, prepared, lambda line: None)
    reference = time.perf_counter() - begun
    run_training(RunSpec(config, run_dir, prepared.path), "single", Silent())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens" in line][WARMUP_STEPS:]
    tokens = sum(step["tokens"] for step in steps)
    seconds = sum(step["tokens"] / step["tokens_per_s"] for step in steps)
    return {**_rates(tokens, seconds), "reference_s": reference}


def trl_trainer(base: Path, rows: Path, flags: dict[str, Any], **settings: Any) -> Any:
    """A `DPOTrainer` with the same LoRA."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(THREADS)
    rank = settings.pop("rank", RANK)
    dataset = load_dataset("json", data_files=str(rows), split="train")
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(dir=base.parent),
            num_train_epochs=1,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **{
                "learning_rate": LR,
                "beta": BETA,
                "per_device_train_batch_size": BATCH,
                "max_length": MAX_LENGTH,
                **flags,
                **settings,
            },
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def run_trl(base: Path, **flags: Any) -> dict[str, float]:
    """TRL's DPOTrainer on the same rows, with its reference computed beforehand."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    begun = time.perf_counter()
    trainer = trl_trainer(base, base.parent / "pairs.jsonl", flags, precompute_ref_log_probs=True)
    reference = time.perf_counter() - begun
    clock = Clock()
    trainer.add_callback(clock)
    counts: list[int] = []
    collate = trainer.data_collator

    def counting(examples: list[Any]) -> Any:
        batch = collate(examples)
        counts.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    counts = counts[-len(clock.ends) :]
    tokens = sum(counts[WARMUP_STEPS:])
    return {
        **_rates(tokens, clock.ends[-1] - clock.ends[WARMUP_STEPS - 1]),
        "reference_s": reference,
    }


def _rates(tokens: int, seconds: float) -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"tokens_per_s": tokens / seconds, "peak_mib": peak}


def points() -> list[tuple[float, float, int]]:
    """(beta, lr, rank) of the trials."""
    return [
        (beta, lr, rank) for beta in (0.03, 0.1, 0.3) for lr in (1e-3, 3e-3) for rank in (8, 16)
    ]


def sweep_ours(base: Path, cell: str) -> dict[str, float]:
    """The command, over the same points."""
    config = base.parent / "sweep.yaml"
    config.write_text(
        json.dumps(
            {
                "name": f"sweep-{os.getpid()}",
                "storage": str(base.parent / "runs"),
                "model": {"path": str(base)},
                "method": {"name": "lora", "rank": 8, "alpha": 16.0},
                "data": {
                    "train": {"path": str(base.parent / "pairs.jsonl"), "format": "preference"},
                    "separator": "",
                    "validation": 0.05,
                    "max_length": SWEEP_LENGTH,
                },
                "train": {
                    "objective": "dpo",
                    "batch_size": SWEEP_BATCH,
                    "lr": 1e-3,
                    "max_examples": TRIAL_PAIRS[cell],
                    "eval_every_examples": TRIAL_PAIRS[cell],
                    "precision": "float32",
                },
                "search": {
                    "metric": "eval_reward_accuracy",
                    "sampler": "grid",
                    "scheduler": None,
                    "space": {
                        "train.dpo.beta": {"choice": [0.03, 0.1, 0.3]},
                        "train.lr": {"choice": [1e-3, 3e-3]},
                        "method.rank": {"choice": [8, 16]},
                    },
                },
            }
        )
    )
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "raytune_ft", "sweep", str(config)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
    )
    return {"seconds": time.perf_counter() - begun}


def sweep_trl(base: Path, cell: str) -> dict[str, float]:
    """One trainer after another in one process; TRL keeps the reference of the first."""
    begun = time.perf_counter()
    for beta, lr, rank in points():
        trainer = trl_trainer(
            base,
            base.parent / "pairs.jsonl",
            {"gradient_checkpointing": False, "bf16": False},
            precompute_ref_log_probs=True,
            beta=beta,
            learning_rate=lr,
            rank=rank,
            per_device_train_batch_size=SWEEP_BATCH,
            max_length=SWEEP_LENGTH,
            max_steps=TRIAL_PAIRS[cell] // SWEEP_BATCH,
        )
        trainer.train()
    return {"seconds": time.perf_counter() - begun}


Arms = dict[str, Callable[[Path, str], dict[str, float]]]
STEPS: Arms = {
    "ours": lambda base, _: run_ours(base, "dpo"),
    "sft": lambda base, _: run_ours(base, "sft"),
    "trl": lambda base, _: run_trl(base),
    "trl-best": lambda base, _: run_trl(base, bf16=True, gradient_checkpointing=False),
    "trl-float32": lambda base, _: run_trl(base, bf16=False, gradient_checkpointing=False),
}
SWEEPS: Arms = {"ours": sweep_ours, "trl": sweep_trl}
ARMS: dict[str, Arms] = {"step": STEPS, **dict.fromkeys(TRIAL_PAIRS, SWEEPS)}


def main() -> None:
    """Run the arms in turns and print a table; or one arm, as the turns do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--cell", choices=ARMS, default="step")
    parser.add_argument(
        "--pairs", type=int, help="by default 80, and a tenth more than a trial of a sweep sees"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", help="some of them; by default all")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm is not None:
        print(json.dumps(ARMS[args.cell][args.arm](args.base, args.cell)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = root / "base"
        count = 80
        if args.cell in TRIAL_PAIRS:
            count = TRIAL_PAIRS[args.cell] * 11 // 10
            base.symlink_to((args.shared / "models/stories260k").resolve())
        else:
            build_base(base, args.shared)
        make_pairs(args.shared, root, args.cell, args.pairs or count)
        arms = args.arms or list(ARMS[args.cell])
        found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for _ in range(args.rounds):
            for name in found:
                found[name].append(_alone(args, name, base))
                print(f"{name}: {found[name][-1]}", file=sys.stderr)
    for name, results in found.items():
        medians = {key: statistics.median(one[key] for one in results) for key in results[0]}
        print(
            f"| {name} | "
            + " | ".join(f"{key} {value:.1f}" for key, value in medians.items())
            + " |"
        )


def _alone(args: argparse.Namespace, arm: str, base: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--cell", args.cell, "--arm", arm, "--base", str(base)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
