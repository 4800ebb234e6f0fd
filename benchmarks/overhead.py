"""The overhead of our training step over a bare PyTorch loop on the same work, on a CPU.

    python benchmarks/overhead.py --shared ../shared
    python benchmarks/overhead.py --shared ../shared --cpu-time

Both arms train the same model from the same weights, on the same micro-batches, with the same
AdamW, in one process, step by step, and take turns at being first: oneDNN compiles a kernel for
each new shape, and who comes second finds it compiled. Our arm is `train.loop.train` as `raytune-ft
train` runs it: it lays each step out, collates it, votes, clips, writes `metrics.jsonl`. The bare
arm gets its micro-batches ready made, outside its clock, and does forward, cross entropy, backward,
clip, step. Their losses are compared at every step, so that both do the same work.

Models: a Llama of 24M random parameters and stories260k; LoRA of rank 16 and full, float32 and
bfloat16. The figure is the mean of two medians of (ours / bare - 1): over the steps at which ours
was first, and over those at which it was second. With `--cpu-time` it is of the CPU time of all
threads, and torch has one, since one that waits for another would count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from train_throughput import MAX_LENGTH, THREADS, build_base

from raytune_ft.config.schema import Config
from raytune_ft.data.batch import NO_TARGET, MicroBatch
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import PreparedData
from raytune_ft.model.export import Exporter
from raytune_ft.model.load import disk_dtype, load_tokenizer
from raytune_ft.model.meta import build
from raytune_ft.records import StepMetrics
from raytune_ft.rundir import RunSpec
from raytune_ft.strategy import build_strategy
from raytune_ft.train.loop import train
from raytune_ft.train.material import Given
from raytune_ft.train.model_runner import ModelRunner
from raytune_ft.train.optim import build_optimizer
from raytune_ft.train.report import Silent
from raytune_ft.train.setup import build_objective, build_run_state, build_runner, order_of
from raytune_ft.train.stopping import Host

WARMUP_STEPS = 3


def config_of(base: Path, rows: Path, method: str, precision: str, batch: int) -> Config:
    """One run without evaluations or checkpoints in its steps."""
    source = {"path": str(rows), "prompt": "question", "completion": "answer"}
    methods: dict[str, Any] = {"lora": {"name": "lora", "rank": 16}, "full": {"name": "full"}}
    return Config.model_validate(
        {
            "name": "overhead",
            "model": {"path": str(base)},
            "method": methods[method],
            "data": {"train": source, "validation": 0.002, "max_length": MAX_LENGTH},
            "train": {
                "batch_size": batch,
                "lr": 2e-4,
                "lr_schedule": "constant",
                "precision": precision,
                "eval_every_examples": 10**9,
            },
            "checkpoint": {"every_examples": 10**9},
        }
    )


def runner_of(config: Config, data: PreparedData) -> ModelRunner:
    """A freshly built model; the same weights each time, since they follow from the seed."""
    strategy = build_strategy("single", config.parallel, config.train.precision)
    built = build(
        config.model, config.method, config.train.precision, config.seed, strategy.takes_parts, None
    )
    optimizer_of = partial(build_optimizer, train=config.train)
    objective = build_objective(config, data, strategy)
    return build_runner(built, config, strategy, optimizer_of, objective)


@dataclass
class Bare(Silent):
    """Runs the bare steps between ours, from our reporter; both are timed."""

    engine: ModelRunner
    config: Config
    data: PreparedData
    clock: Callable[[], float]
    ours_s: list[float] = field(default_factory=list)
    bare_s: list[float] = field(default_factory=list)
    our_losses: list[float] = field(default_factory=list)
    bare_losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        causal_lm: Any = getattr(self.engine.model, "get_base_model", lambda: self.engine.model)()
        self.body, self.head = causal_lm.model, causal_lm.lm_head
        self.parameters = [p for p in self.engine.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(
            {n: p for n, p in self.engine.model.named_parameters() if p.requires_grad},
            self.config.train,
        )
        self.order = order_of(self.config, self.data)
        self.began = self.clock()

    def step(self, metrics: StepMetrics) -> None:
        """One of our steps has ended; what comes after this call is the next one.

        The bare arm catches up, and is first at every other step.
        """
        self.ours_s.append(self.clock() - self.began)
        self.our_losses.append(metrics.loss)
        done = len(self.ours_s)
        while len(self.bare_s) < done + done % 2:
            self.bare_step(len(self.bare_s))
        self.began = self.clock()

    def bare_step(self, step: int) -> None:
        """Time one step on micro-batches that lie ready."""
        batch = self.config.train.batch_size
        indices = self.order.indices(step * batch, batch)
        count = self.engine.objective.count(self.data.train, indices)
        batches = self.engine.micro_batches(self.data.train, indices)
        began = self.clock()
        self.bare_losses.append(self.train_on(batches, count))
        self.bare_s.append(self.clock() - began)

    def overhead(self) -> float:
        """Ours over bare, less 1, after the warm-up."""
        both = zip(self.ours_s, self.bare_s, strict=False)
        ratios = [ours_s / bare_s for ours_s, bare_s in both][WARMUP_STEPS:]
        return (statistics.median(ratios[::2]) + statistics.median(ratios[1::2])) / 2 - 1

    def largest_difference(self) -> float:
        """Of the losses of a step, relative."""
        both = zip(self.our_losses, self.bare_losses, strict=False)
        return max(abs(bare - ours) / abs(ours) for ours, bare in both)

    def train_on(self, batches: list[MicroBatch], label_tokens: float) -> float:
        """What a careful user would write by hand."""
        total = 0.0
        for batch in batches:
            keep_BS = batch.targets_BS != NO_TARGET
            with torch.autocast("cpu", torch.bfloat16, self.config.train.precision == "bfloat16"):
                hidden_BSH = self.body(**self.engine.inputs(batch)).last_hidden_state
                logits_NV = self.head(hidden_BSH[keep_BS])
            loss = F.cross_entropy(logits_NV.float(), batch.targets_BS[keep_BS], reduction="sum")
            (loss / label_tokens).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_grad_norm or 1e9)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / label_tokens


def measure(
    base: Path,
    rows: Path,
    method: str,
    precision: str,
    batch: int,
    steps: int,
    clock: Callable[[], float],
) -> None:
    """Print one line of the table."""
    config = config_of(base, rows, method, precision, batch)
    budget = config.train.model_copy(update={"max_examples": batch * steps})
    config = config.model_copy(update={"train": budget})
    root = Path(tempfile.mkdtemp(dir=base.parent))
    data = prepare_data(config.data, load_tokenizer(config.model), 0, base.parent / "cache")
    ours, bare_engine = runner_of(config, data), runner_of(config, data)
    bare = Bare(bare_engine, config, data, clock)
    spec, host = RunSpec(config, root / "run", data.path), Host()
    spec.run_dir.mkdir()
    exporter = Exporter(ours.model, disk_dtype(config.model, None), None)
    with ThreadPoolExecutor(1) as pool:
        run = build_run_state(
            spec, data, ours.strategy, ours.names, exporter, ours.strategy, bare, host.heart, pool
        )
        train(ours, Given(ours, data), run, host)
        run.close()
    print(
        json.dumps(
            {
                "model": base.name,
                "method": method,
                "precision": precision,
                "batch_size": batch,
                "steps": steps - WARMUP_STEPS,
                "bare_ms": round(1e3 * statistics.median(bare.bare_s[WARMUP_STEPS:]), 2),
                "overhead_percent": round(100 * bare.overhead(), 2),
                "largest_loss_difference": f"{bare.largest_difference():.1e}",
            }
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shared", type=Path, default=Path("../shared"), help="real data and models"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps of each arm (default 20)")
    parser.add_argument("--short", action="store_true", help="the small model alone, 10 steps")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="of one thread; others may use the machine",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.cpu_time else THREADS)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rows = arguments.shared / "data/gsm8k/train.jsonl"
    stories = arguments.shared / "models/stories260k"
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "llama-24m"
        small = Path(folder) / "stories260k"
        small.symlink_to(stories.resolve())
        models = [(small, 16)]
        if not arguments.short:
            build_base(large, arguments.shared)
            models.append((large, 4))
        for base, batch in models:
            for method in ("lora", "full"):
                for precision in ("float32", "bfloat16"):
                    steps = 10 if arguments.short else arguments.steps
                    measure(base, rows, method, precision, batch, steps, clock)


if __name__ == "__main__":
    main()
