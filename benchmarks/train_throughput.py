"""Training throughput of one process on a CPU: ours against TRL's `SFTTrainer`.

    python benchmarks/train_throughput.py --shared ../shared

A 24M-parameter Llama with random weights, LoRA of rank 16 on all linear layers, rows of GSM8K,
2 threads. Every arm trains on the same examples, in a process of its own; the arms take turns.
The figure is non-pad tokens per second of training alone: start-up, evaluation and the first two
steps are left out. `--cpu-time` gives them per second of CPU time, on one thread, as a machine that
others use needs it. It needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
BATCH = 16
WARMUP_STEPS = 2
CPU_TIME = "BENCHMARK_CPU_TIME"
MAX_LENGTH = 512
RANK, ALPHA, LR = 16, 32, 2e-4


def build_base(directory: Path, shared: Path) -> None:
    """The model that all arms load: 24M random parameters, tokenizer of stories260k."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260k")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1280,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
    )
    model = AutoModelForCausalLM.from_config(config)
    print(f"base: {model.num_parameters() / 1e6:.1f}M parameters", file=sys.stderr)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def now() -> float:
    """Seconds, or those of CPU time under `--cpu-time`."""
    return time.process_time() if os.environ.get(CPU_TIME) else time.perf_counter()


def threads() -> int:
    """One under `--cpu-time`, since a thread that waits for another counts as well."""
    return 1 if os.environ.get(CPU_TIME) else THREADS


def rate(counts: list[int], ends: list[float]) -> dict[str, float]:
    """From the tokens of each step and the time of its end."""
    tokens, seconds = sum(counts[WARMUP_STEPS:]), ends[-1] - ends[WARMUP_STEPS - 1]
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def run_ours(base: Path, data: Path, precision: str) -> dict[str, float]:
    """The loop of this package, as `raytune-ft train` runs it under strategy single."""
    import torch

    from raytune_ft.config.schema import Config
    from raytune_ft.data.prepare import prepare_data
    from raytune_ft.model.load import load_tokenizer
    from raytune_ft.records import StepMetrics
    from raytune_ft.rundir import RunSpec
    from raytune_ft.train.report import Silent
    from raytune_ft.train.run import run_training

    torch.set_num_threads(threads())
    run_dir = base.parent / f"ours-{os.getpid()}"
    run_dir.mkdir()
    source = {"path": str(data), "prompt": "question", "completion": "answer"}
    config = Config.model_validate(
        {
            "name": "throughput",
            "model": {"path": str(base)},
            "method": {"name": "lora", "rank": RANK, "alpha": float(ALPHA)},
            "data": {"train": source, "validation": 0.02, "max_length": MAX_LENGTH},
            "train": {
                "batch_size": BATCH,
                "lr": LR,
                "precision": precision,
                "eval_every_examples": 10**9,
            },
            "checkpoint": {"every_examples": 10**9},
        }
    )
    prepared = prepare_data(config.data, load_tokenizer(config.model), 0, base.parent / "cache")
    counts: list[int] = []
    ends: list[float] = []

    class Clock(Silent):
        def step(self, metrics: StepMetrics) -> None:
            counts.append(metrics.tokens)
            ends.append(now())

    run_training(RunSpec(config, run_dir, prepared.path), "single", Clock())
    return rate(counts, ends)


def run_trl(base: Path, data: Path, **flags: Any) -> dict[str, float]:
    """TRL's SFTTrainer on the same rows."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(threads())
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = load_dataset("json", data_files=str(data), split="train").map(
        lambda row: {"prompt": row["question"] + "\n", "completion": row["answer"]},
        remove_columns=["question", "answer"],
    )

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(now())

    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(dir=base.parent),
            num_train_epochs=1,
            learning_rate=LR,
            max_length=MAX_LENGTH,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            **{"per_device_train_batch_size": BATCH, **flags},
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    counts: list[int] = []
    collate = trainer.data_collator

    def counting(examples: list[Any]) -> Any:
        batch = collate(examples)
        mask = batch.get("attention_mask")
        counts.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
        return batch

    trainer.data_collator = counting
    trainer.train()
    per_step = len(counts) // len(clock.ends)
    steps = range(0, len(clock.ends) * per_step, per_step)
    return rate([sum(counts[at : at + per_step]) for at in steps], clock.ends)


ARMS: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "ours": lambda base, data: run_ours(base, data, "bfloat16"),
    "ours-float32": lambda base, data: run_ours(base, data, "float32"),
    "trl": lambda base, data: run_trl(base, data),
    "trl-best": lambda base, data: run_trl(base, data, bf16=True, gradient_checkpointing=False),
    "trl-best-micro4": lambda base, data: run_trl(
        base,
        data,
        bf16=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=BATCH // 4,
        gradient_accumulation_steps=4,
    ),
}


def main() -> None:
    """Run the arms in turns and print a table; or one arm, as the turns do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--examples", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument(
        "--cpu-time", action="store_true", help="of one thread; others may use the machine"
    )
    parser.add_argument("--one", nargs=3, metavar=("ARM", "BASE", "DATA"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cpu_time:
        os.environ[CPU_TIME] = "1"
    if arguments.one:
        arm, base, data = arguments.one
        print("RESULT", json.dumps(ARMS[arm](Path(base), Path(data))))
        return
    with tempfile.TemporaryDirectory() as folder:
        base, data = Path(folder) / "base", Path(folder) / "train.jsonl"
        build_base(base, arguments.shared)
        rows = (arguments.shared / "data/gsm8k/train.jsonl").read_text().splitlines(keepends=True)
        data.write_text("".join(rows[: arguments.examples]))
        speeds: dict[str, list[float]] = {arm: [] for arm in arguments.arms}
        for _ in range(arguments.rounds):
            for arm in arguments.arms:
                result = run_in_process(arm, base, data)
                speeds[arm].append(result["tokens_per_s"])
                print(f"{arm:16s} {result}", file=sys.stderr, flush=True)
    medians = {arm: statistics.median(values) for arm, values in speeds.items()}
    for arm, median in medians.items():
        values = " ".join(f"{value:.0f}" for value in speeds[arm])
        print(f"{arm:16s} {median:8.0f} non-pad tokens/s   ({values})")
    peers = [median for arm, median in medians.items() if arm.startswith("trl")]
    if peers and "ours" in medians:
        print(f"ours / best of TRL: {medians['ours'] / max(peers):.2f}")


def run_in_process(arm: str, base: Path, data: Path) -> dict[str, float]:
    """One arm in a fresh interpreter, with its threads set before anything is imported."""
    command = [sys.executable, __file__, "--one", arm, str(base), str(data)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads()),
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, float] = json.loads(line.removeprefix("RESULT "))
            return result
    raise SystemExit(f"arm {arm} failed:\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    main()
