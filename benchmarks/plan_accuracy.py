"""Predicted against measured memory of real runs on a CPU.

Every case trains for a few steps in processes of its own, each of which samples its anonymous
memory every 5 ms. Counted is what comes on top of the footprint with everything imported and the
process group up. Parameters, gradients and moments are also counted from the live tensors, at the
end of an optimizer step.

glibc keeps freed memory, so that its figure would be the sum of peaks at different moments. With
M_MMAP_THRESHOLD at 64 KiB every tensor is a mapping of its own and goes back at once, and one arena
keeps what is left together (both by environment variables, which this script sets for itself).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
}
GIB = 2**30
EVERY_S = 0.005
STEPS, BATCH = 2, 4
SIZES = {
    "67M": {"hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 10},
    "150M": {"hidden_size": 896, "intermediate_size": 2432, "num_hidden_layers": 14},
    "300M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24},
}


@dataclass(frozen=True)
class Case:
    """One run."""

    size: str
    method: str
    precision: str
    strategy: str
    workers: int = 1
    checkpointing: str = "none"
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As the table says it."""
        stage = f" ZeRO-{self.more['zero_stage']}" if "zero_stage" in self.more else ""
        return f"{self.strategy}{stage}, {self.method}, {self.size}"


CASES = [
    Case("150M", "full", "float32", "fsdp", 2),
    Case("300M", "lora", "bfloat16", "ddp", 2),
    Case("67M", "full", "float32", "deepspeed", 2, more={"zero_stage": 2}),
    Case("300M", "lora", "float32", "fsdp", 2, "full"),
    Case("67M", "full", "float32", "deepspeed", 2, more={"zero_stage": 3}),
    Case("67M", "full", "float32", "single"),
    Case("67M", "full", "float32", "ddp", 2),
    Case("67M", "full", "bfloat16", "ddp", 2, "full"),
    Case("150M", "full", "bfloat16", "fsdp", 2, "full"),
    Case("67M", "full", "float32", "deepspeed", 2, more={"zero_stage": 1}),
    Case("67M", "full", "bfloat16", "single", checkpointing="full"),
    Case("300M", "lora", "float32", "ddp", 2),
    Case("300M", "lora", "float32", "deepspeed", 2, more={"zero_stage": 3}),
    Case("67M", "full", "bfloat16", "deepspeed", 2, more={"zero_stage": 2}),
]


def make_model(directory: Path, size: str) -> Path:
    """A random Llama with the tokenizer of the packaged model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    path = directory / size
    if not path.exists():
        config = LlamaConfig(
            vocab_size=16384,
            num_attention_heads=16,
            num_key_value_heads=8,
            max_position_embeddings=1024,
            tie_word_embeddings=size != "67M",
            **SIZES[size],
        )
        AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(path)
        tiny = Path(__file__).parents[1] / "raytune_ft" / "model" / "tiny"
        AutoTokenizer.from_pretrained(tiny).save_pretrained(path)
    return path


def make_rows(directory: Path) -> Path:
    """40 rows of 100 to 250 tokens."""
    path = directory / "rows.jsonl"
    words = ["the", "panther", "is", "black", "and", "the", "sea", "is", "blue"]
    rows = [
        {"prompt": " ".join(words * (2 + n % 5)), "completion": " ".join(words * (2 + n % 3))}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(case: Case, directory: Path) -> Any:
    """Two steps, and a checkpoint after each."""
    from raytune_ft.config.schema import Config

    method = {"name": "full"} if case.method == "full" else {"name": "lora", "rank": 16}
    return Config.model_validate(
        {
            "name": "run",
            "model": {"path": str(make_model(directory, case.size))},
            "method": method,
            "data": {
                "train": {"path": str(make_rows(directory))},
                "validation": 0.1,
                "max_bad_fraction": 0.5,
            },
            "train": {
                "precision": case.precision,
                "batch_size": BATCH,
                "max_examples": BATCH * STEPS,
                "eval_every_examples": BATCH * STEPS,
                "micro_tokens": 512,
            },
            "checkpoint": {"every_examples": BATCH},
            "parallel": {
                "strategy": case.strategy,
                "workers": case.workers,
                "activation_checkpointing": case.checkpointing,
                **case.more,
            },
        }
    )


class Sampler:
    """Peak of this process' anonymous memory, above where it stood at the start."""

    def __init__(self) -> None:
        self._file = open("/proc/self/status", "rb", buffering=0)  # noqa: SIM115
        self.base = self.now()
        self.peak = self.base
        self.timeline: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> int:
        self._file.seek(0)
        text = self._file.read()
        return int(text[text.index(b"RssAnon:") + 8 :].split(maxsplit=1)[0]) * 1024

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self.peak - self.base

    def _watch(self) -> None:
        started = time.perf_counter()
        while not self._over.wait(EVERY_S):
            now = self.now()
            self.peak = max(self.peak, now)
            self.timeline.append((time.perf_counter() - started, now - self.base))


def worker(rank: int, case: Case, port: int, directory: str, results: str) -> None:
    """One process of a run."""
    os.environ.update(LOCAL_RANK="0")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from raytune_ft.data.prepare import prepare_data
    from raytune_ft.model.load import load_tokenizer
    from raytune_ft.rundir import RunSpec
    from raytune_ft.strategy import strategy_class
    from raytune_ft.train.report import Silent
    from raytune_ft.train.run import run_training

    if case.strategy == "deepspeed":
        from raytune_ft.strategy.deepspeed import _import_deepspeed

        _import_deepspeed(torch.device("cpu"))
    config = config_of(case, Path(directory))
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config.data, tokenizer, config.seed, Path(directory) / "cache")
    if case.workers > 1 or case.strategy == "deepspeed":
        store = dist.TCPStore("127.0.0.1", port, case.workers, is_master=rank == 0)
        dist.init_process_group("gloo", rank=rank, world_size=case.workers, store=store)
        dist.all_reduce(torch.zeros(1))
    seen: dict[str, int] = {}
    kind = strategy_class(case.strategy)
    prepare, step = kind.prepare, kind.step

    def prepared(self: Any, model: Any, optimizer_of: Any) -> Any:
        self.seen_model = model
        return prepare(self, model, optimizer_of)

    def stepped(self: Any, lr: float, max_norm: float | None) -> float:
        gradients = _gradient_bytes(self, self.seen_model)
        norm = step(self, lr, max_norm)
        seen["gradients"] = gradients
        seen["parameters"] = _storage_bytes(self.seen_model.parameters())
        seen["optimizer"] = sum(
            _local_bytes(t)
            for state in self.optimizer.state.values()
            for name, t in state.items()
            if name in ("exp_avg", "exp_avg_sq")
        )
        if hasattr(self, "zero"):  # DeepSpeed's master weights, beside the parameters
            seen["optimizer"] += sum(_local_bytes(flat) for flat in self.zero.flats())
        return norm

    kind.prepare, kind.step = prepared, stepped  # type: ignore[method-assign]
    gc.collect()
    sampler = Sampler()
    spec = RunSpec(config, Path(results) / "run", data.path)
    spec.run_dir.mkdir(parents=True, exist_ok=True)
    result = run_training(spec, case.strategy, Silent())
    assert result.status == "completed", result
    seen["peak"] = sampler.stop()
    if os.environ.get("TIMELINE"):
        (Path(results) / f"timeline-{rank}.json").write_text(json.dumps(sampler.timeline))
    (Path(results) / f"rank-{rank}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _gradient_bytes(strategy: Any, model: Any) -> int:
    """Of whole gradients, before the optimizer's step; DeepSpeed keeps them apart."""
    from torch.utils._pytree import tree_leaves

    found = [p.grad for p in model.parameters() if p.grad is not None]
    if hasattr(strategy, "engine"):
        kept = tree_leaves(dict(strategy.engine.optimizer.averaged_gradients))
        found += [tensor for tensor in kept if hasattr(tensor, "numel")]
    return sum(map(_local_bytes, found))


def _local_bytes(tensor: Any) -> int:
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(tensor.numel() * tensor.element_size())


def _storage_bytes(parameters: Any) -> int:
    """Every storage once: flat buffers hold several parameters, and ties share one."""
    found: dict[int, int] = {}
    for parameter in parameters:
        shard = getattr(parameter, "ds_tensor", None)  # ZeRO-3's own part of it
        tensor = parameter.detach() if shard is None else shard
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        found[tensor.data_ptr()] = int(tensor.numel() * tensor.element_size())
    return sum(found.values())


def measure(case: Case, directory: Path) -> dict[str, int]:
    """Run it; the most of any rank."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory(dir=directory) as results, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        mp.spawn(worker, (case, port, str(directory), results), nprocs=case.workers)
        if keep := os.environ.get("TIMELINE"):
            for file in Path(results).glob("timeline-*.json"):
                (Path(keep) / file.name).write_bytes(file.read_bytes())
        ranks = [json.loads(file.read_text()) for file in Path(results).glob("rank-*.json")]
    return {key: max(rank[key] for rank in ranks) for key in ranks[0]}


def predict(case: Case, directory: Path) -> dict[str, int]:
    """What `plan` says of it."""
    from raytune_ft.data.prepare import prepare_data
    from raytune_ft.estimate.memory import MemoryModel, work_of
    from raytune_ft.estimate.parameters import build_shell
    from raytune_ft.model.load import load_tokenizer

    config = config_of(case, directory)
    data = prepare_data(config.data, load_tokenizer(config.model), config.seed, directory / "cache")
    shell = build_shell(config.model, config.method, config.train.precision)
    work = work_of(config, data.train, case.workers, "cpu")
    memory = MemoryModel(shell, (work.rows,), work.width).estimate(config.parallel, work, "cpu")
    if os.environ.get("TIMELINE"):
        print(work, {k: f"{v / 2**20:.0f}" for k, v in asdict(memory).items()})
    return asdict(memory)


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.environ.update(ENVIRONMENT)
        os.execv(sys.executable, [sys.executable, "-W", "ignore", *sys.argv])
    print("| run | workers | precision | checkpointing | parameters | gradients | optimizer "
          "| peak predicted | measured | off |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if arguments.only not in f"{case.name} {case.precision} {case.checkpointing}":
                continue
            predicted = predict(case, Path(folder))
            measured = measure(case, Path(folder))
            exact = [
                f"{predicted[key] / measured[key] - 1:+.1%}" if measured.get(key) else "-"
                for key in ("parameters", "gradients", "optimizer")
            ]
            peaks = [f"{value['peak'] / GIB:.2f} GiB" for value in (predicted, measured)]
            off = f"{predicted['peak'] / measured['peak'] - 1:+.0%}"
            cells = [case.name, str(case.workers), case.precision, case.checkpointing]
            print(f"| {' | '.join([*cells, *exact, *peaks, off])} |", flush=True)


if __name__ == "__main__":
    main()
