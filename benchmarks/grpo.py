"""GRPO on a CPU: ours against TRL's `GRPOTrainer`, from the model on disk to the last step.

    python benchmarks/grpo.py --shared ../shared
    python benchmarks/grpo.py --shared ../shared --cell answers
    python benchmarks/grpo.py --shared ../shared --short

`stories`: stories260k goes on with a story whose first sentence names an animal; a completion is
worth 1 where it names it again, and all have 48 tokens. `answers`: the packaged model answers the
prompts of jobs/quickstart_grpo.yaml in up to 48 tokens and is right to the letter or not; most
answers end after 6.

Both arms have the same prompts, reward function, samples a step (16 x 8, and 32 x 8), LoRA of rank
16 on all linear layers, learning rate and AdamW, in float32; a step of TRL is one micro-batch.
`seconds` are those of building the trainer and of all steps, without imports; ours are with the
start of the process of the reward and two evaluations of 8 prompts. `cpu_s` is the processor time
of that span with all child processes, which says more on a busy machine. `reward` is the mean of
the last five rollouts. Arms take turns, each in a process of its own. It needs `bench`.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

ANIMALS = (
    "dog cat bird bunny frog mouse pig cow horse fox tiger rabbit squirrel turtle elephant puppy "
    "butterfly bee bear fish"
)
NAMES = "Lily Tim Max Sue Ben Mia Tom Amy Spot Sam"
EACH, TOKENS, LR, RANK, LAST = 8, 48, 1e-3, 16, 5
REWARDS = {"animal": "named", "answer": "right"}
REWARD = '''"""The reward of the benchmark."""

import re


def named(completions, animal, **columns):
    return [float(re.search(rf"\\b{a}", one) is not None) for one, a in zip(completions, animal)]


def right(completions, answer, **columns):
    return [float(one.strip() == a) for one, a in zip(completions, answer)]
'''


@dataclass(frozen=True)
class Cell:
    """A task: its model, the column that its reward reads, and the prompts of a step."""

    model: str
    column: str
    batch: int

    def base(self, shared: Path) -> Path:
        """The model's folder."""
        from raytune_ft.model.load import resolve_model_path

        own = self.model.startswith("builtin:")
        return Path(resolve_model_path(self.model) if own else (shared / self.model).resolve())


CELLS = {
    "stories": Cell("models/stories260k", "animal", 16),
    "answers": Cell("builtin:tiny", "answer", 32),
}


def write_inputs(cell: str, root: Path) -> None:
    """Prompts, and the file of the reward."""
    (root / "reward.py").write_text(REWARD)
    if cell == "stories":
        rows = [
            {"prompt": f"Once upon a time, there was a little {one} named {name}.", "animal": one}
            for one, name in product(ANIMALS.split(), NAMES.split())
        ]
    else:
        lines = Path("jobs/data/tiny_prompts/train.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
    for name, part in {"train": rows[8:], "validation": rows[:8]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def config_of(cell: Cell, base: Path, root: Path, steps: int, seed: int, lr: float = LR) -> Any:
    """A run of this package."""
    from raytune_ft.config.schema import Config

    return Config.model_validate(
        {
            "name": "grpo",
            "seed": seed,
            "model": {"path": str(base)},
            "method": {"name": "lora", "rank": RANK, "alpha": float(2 * RANK)},
            "data": {
                "train": {"path": str(root / "train.jsonl"), "format": "prompt"},
                "validation": {"path": str(root / "validation.jsonl"), "format": "prompt"},
            },
            "rewards": [f"{root / 'reward.py'}:{REWARDS[cell.column]}"],
            "train": {
                "objective": "grpo",
                "rollout": {"num_generations": EACH, "max_completion_length": TOKENS},
                "batch_size": cell.batch,
                "lr": lr,
                "lr_schedule": "constant",
                "max_examples": cell.batch * steps,
                "eval_every_examples": 10**9,
                "precision": "float32",
            },
            "checkpoint": {"every_examples": 10**9},
        }
    )


def prepare(config: Any, cache: Path) -> Any:
    """The tokens and prompts of a run."""
    from raytune_ft.data.prepare import prepare_data
    from raytune_ft.data.prompts import prompted
    from raytune_ft.model.load import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    prepared = prepare_data(config.data, tokenizer, config.seed, cache)
    return prompted(config, prepared, tokenizer)


def rewards_in(run_dir: Path) -> list[float]:
    """The mean reward of each rollout."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["reward"] for line in lines if "reward" in line]


def run_ours(cell: Cell, base: Path, root: Path, steps: int, seed: int) -> dict[str, float]:
    """The loop of this package, as `raytune-ft train` runs it in one process."""
    from raytune_ft.rundir import RunSpec
    from raytune_ft.train.report import Silent
    from raytune_ft.train.run import run_training

    config, run_dir = config_of(cell, base, root, steps, seed), Path(tempfile.mkdtemp(dir=root))
    with Span() as span:
        prepared = prepare(config, run_dir / "cache")
        run_training(RunSpec(config, run_dir, prepared.path), "single", Silent())
    return span.figures(rewards_in(run_dir))


def run_trl(cell: Cell, base: Path, root: Path, steps: int, seed: int) -> dict[str, float]:
    """TRL's trainer, with nothing on that costs memory for time."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    rewards: list[float] = []

    own = runpy.run_path(str(root / "reward.py"))[REWARDS[cell.column]]

    def reward(**columns: Any) -> list[float]:
        found: list[float] = own(**columns)
        rewards.append(statistics.fmean(found))
        return found

    with Span() as span:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=tempfile.mkdtemp(dir=root),
                per_device_train_batch_size=cell.batch * EACH,
                gradient_accumulation_steps=1,
                steps_per_generation=1,
                num_generations=EACH,
                max_completion_length=TOKENS,
                max_steps=steps,
                seed=seed,
                learning_rate=LR,
                lr_scheduler_type="constant",
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=load_dataset("json", data_files=str(root / "train.jsonl"), split="train"),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.train()
    return span.figures(rewards)


class Span:
    """The time that a block of code takes."""

    def __enter__(self) -> Span:
        self._began, self._cpu = time.perf_counter(), _cpu_s()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_s = time.perf_counter() - self._began, _cpu_s() - self._cpu

    def figures(self, rewards: list[float]) -> dict[str, float]:
        """With the mean reward of the last rollouts."""
        reward = statistics.fmean(rewards[-LAST:])
        return {"seconds": self.seconds, "cpu_s": self.cpu_s, "reward": reward}


def _cpu_s() -> float:
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in found)


ARMS: dict[str, Callable[[Cell, Path, Path, int, int], dict[str, float]]] = {
    "ours": run_ours,
    "trl": run_trl,
}


def main() -> None:
    """Run the arms in turns and print a table; or one arm, as the turns do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--cell", choices=CELLS, default="stories")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one round of 3 steps")
    parser.add_argument("--profile", action="store_true", help="of ours, where its time goes")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first round; then one more each"
    )
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    steps, rounds = (3, 1) if args.short else (args.steps, args.rounds)
    cell = CELLS[args.cell]
    base = cell.base(args.shared)
    if args.arm is not None:
        print(json.dumps(ARMS[args.arm](cell, base, args.root, steps, args.seed)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_inputs(args.cell, root)
        if args.profile:
            profile = cProfile.Profile()
            print(profile.runcall(run_ours, cell, base, root, steps, args.seed))
            pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
            return
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
        for number in range(rounds):
            for name in found:
                command = [sys.executable, __file__, "--shared", str(args.shared), "--arm", name]
                command += ["--root", str(root), "--steps", str(steps), "--cell", args.cell]
                command += ["--seed", str(args.seed + number)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{name}: {found[name][-1]}", file=sys.stderr)
    medians = {
        name: {key: statistics.median(one[key] for one in each) for key in each[0]}
        for name, each in found.items()
    }
    for name, each in medians.items():
        print(
            f"| {name} | " + " | ".join(f"{key} {value:.2f}" for key, value in each.items()) + " |"
        )
    ratios = {key: medians["trl"][key] / medians["ours"][key] for key in ("seconds", "cpu_s")}
    print("TRL over ours: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))


if __name__ == "__main__":
    main()
