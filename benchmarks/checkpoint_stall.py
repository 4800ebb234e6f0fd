"""Seconds that training stands still for a checkpoint, synchronous and asynchronous.

    python benchmarks/checkpoint_stall.py

A full fine-tune of a 92M-parameter Llama in float32: weights and both moments are 1.1 GB. One
process, then two under fsdp, each of which saves its shards. A stall is the time that the loop
spends in the saver for one checkpoint; the wait for the very last one, when nothing is left to
train, is not one. Every arm runs in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SAVES = 3  # beside the last one
STEPS_BETWEEN = 4
BATCH = 2


def main() -> None:
    """Run all arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768, help="smaller for a quick look")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = make_inputs(root, arguments.hidden)
        print(f"state: {size / 1e9:.2f} GB")
        print("| workers | saving | stall of each checkpoint, s | median | steps, s |")
        print("|---|---|---|---|---|")
        for workers in arguments.workers:
            medians = {}
            for asynchronous in (False, True):
                stalls, steps = measure(root, workers, asynchronous)
                medians[asynchronous] = statistics.median(stalls)
                name = "asynchronous" if asynchronous else "synchronous"
                shown = ", ".join(f"{stall:.2f}" for stall in stalls)
                print(
                    f"| {workers} | {name} | {shown} | {medians[asynchronous]:.2f} | "
                    f"{statistics.median(steps):.2f} |",
                    flush=True,
                )
            print(f"| {workers} | ratio | | {medians[True] / medians[False]:.2f} | |", flush=True)


def make_inputs(root: Path, hidden: int) -> int:
    """A model and rows; the bytes of weights and moments."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from raytune_ft.model.load import resolve_model_path

    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("builtin:tiny"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            max_position_embeddings=256,
        )
    )
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = [{"prompt": f"count to {n}", "completion": "one two three " * 4} for n in range(40)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 12 * sum(parameter.numel() for parameter in model.parameters())


def measure(root: Path, workers: int, asynchronous: bool) -> tuple[list[float], list[float]]:
    """Stalls of the checkpoints but the last, the longest over ranks; seconds of the steps."""
    with tempfile.TemporaryDirectory(dir=root) as folder, _store(workers) as port:
        arguments = (workers, port, root, Path(folder), asynchronous)
        mp.spawn(_worker, arguments, nprocs=workers)
        ranks = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(workers)]
    stalls = [max(values) for values in zip(*(rank["stalls"] for rank in ranks), strict=True)]
    return stalls[:SAVES], ranks[0]["steps"]


def _worker(
    rank: int, workers: int, port: int, root: Path, folder: Path, asynchronous: bool
) -> None:
    from raytune_ft.config.schema import Config
    from raytune_ft.data.prepare import prepare_data
    from raytune_ft.model.load import load_tokenizer
    from raytune_ft.rundir import RunSpec
    from raytune_ft.train.checkpoint import Saver
    from raytune_ft.train.report import Silent
    from raytune_ft.train.run import run_training

    torch.set_num_threads(max(1, 2 // workers))
    every = STEPS_BETWEEN * BATCH
    config = Config.model_validate(
        {
            "name": "stall",
            "storage": str(folder),
            "model": {"path": str(root / "model")},
            "method": {"name": "full"},
            "data": {"train": {"path": str(root / "rows.jsonl")}, "max_length": 64},
            "train": {
                "batch_size": BATCH,
                "max_examples": every * (SAVES + 1),
                "eval_every_examples": 10**9,  # once, at the end
                "precision": "float32",
                "lr": 1e-5,
            },
            "parallel": {"strategy": "single" if workers == 1 else "fsdp", "workers": workers},
            "checkpoint": {"every_examples": every, "asynchronous": asynchronous},
        }
    )
    prepared = prepare_data(config.data, load_tokenizer(config.model), 0, root / "cache")
    stalls: list[float] = []
    save = Saver.save

    def timed(self: Saver, *arguments: Any) -> None:
        started = time.perf_counter()
        save(self, *arguments)
        stalls.append(time.perf_counter() - started)

    class Steps(Silent):
        seconds: list[float] = []  # noqa: RUF012 - one run a process

        def step(self, metrics: Any) -> None:
            self.seconds.append(metrics.tokens / metrics.tokens_per_s)

    Saver.save = timed  # type: ignore[assignment, method-assign]
    if workers > 1:
        store = dist.TCPStore("127.0.0.1", port, workers, is_master=False)
        dist.init_process_group("gloo", rank=rank, world_size=workers, store=store)
    (folder / "run").mkdir(exist_ok=True)
    strategy = config.parallel.strategy
    run_training(RunSpec(config, folder / "run", prepared.path), strategy, Steps())
    result = {"stalls": stalls, "steps": Steps.seconds}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    if workers > 1:
        dist.destroy_process_group()


class _store:
    """A rendezvous for the workers; its port on entry."""

    def __init__(self, workers: int) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, workers, is_master=True, wait_for_workers=False)

    def __enter__(self) -> int:
        return self._store.port

    def __exit__(self, *_: object) -> None:
        del self._store


if __name__ == "__main__":
    main()
