"""How much memory a worker needs to load its share of a model, against from_pretrained on each.

A random Llama of 1.6B parameters is written in bfloat16, one file for every four blocks. 1, 2 and
4 workers (processes over gloo) load it under fsdp: each its parts, or each the whole model by
from_pretrained, which is then sharded. While they do, this process reads their RssAnon, which is
memory that is theirs alone: pages of files that are mapped do not count.

Sizes are in megabytes of 10^6 bytes.

    shard   bytes of the parameters and buffers that the worker holds when it is done
    block   bytes of the largest block, or of an embedding if that is larger, in the dtype held
    bound   1.3 x (shard + block)
    peak    RssAnon above that of the idle worker, which has imported all and joined its group
    mapped  the same of RssFile: pages of files, which all workers share and the system may drop;
            from_pretrained leaves weights there whose dtype it need not change
    s       until the slowest worker is done; CPU s is the most that one of them computed
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from raytune_ft.config.methods import FullMethod, LoraMethod
from raytune_ft.config.schema import ModelConfig, ParallelConfig
from raytune_ft.layout import shard_name
from raytune_ft.model.blocks import find_blocks
from raytune_ft.model.load import build_model
from raytune_ft.model.meta import build
from raytune_ft.strategy.fsdp import Fsdp
from raytune_ft.tensors.write import Entry, write_tensors

METHODS = {
    "lora": LoraMethod(rank=8),  # the base is frozen and held in bfloat16
    "full": FullMethod(name="full"),  # held in float32
}
ALLOWED = 1.3
MB = 1e6


def write_model(directory: Path, layers: int) -> int:
    """The model's files, written tensor by tensor; the number of its parameters."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=32000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    names, count = list(shapes), 1 + layers // 4
    width = -(-len(names) // count)
    files = {name: shard_name("model", i // width, count) for i, name in enumerate(names)}
    remaining = iter(names)
    while held := list(islice(remaining, width)):
        entries = [Entry(name, torch.bfloat16, shapes[name]) for name in held]
        write_tensors(directory, files[held[0]], entries, _random(entries))
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _random(entries: list[Entry]) -> Iterator[torch.Tensor]:
    for entry in entries:
        yield torch.empty(entry.shape, dtype=entry.dtype).normal_(std=0.02)


def worker(rank: int, workers: int, port: int, arm: str, method: str, path: str, to: Any) -> None:
    """Joins the group, waits for the word, loads, and tells what it holds."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, workers, is_master=rank == 0)
    dist.init_process_group("gloo", rank=rank, world_size=workers, store=store)
    strategy = Fsdp(ParallelConfig(), "bfloat16")
    dist.barrier()
    to.send("idle")
    to.recv()
    started, busy = time.perf_counter(), time.process_time()
    arguments = (ModelConfig(path=path), METHODS[method], "bfloat16", 0)
    if arm == "parts":
        built = build(*arguments, in_parts=True)  # type: ignore[arg-type]
        assert built.weights is not None, built.notes
        model = strategy.lay_out(built.model)
        held = {name: strategy.part(name, p.detach()) for name, p in model.named_parameters()}
        built.weights.fill(held)
    else:
        model = strategy.lay_out(build_model(*arguments))  # type: ignore[arg-type]
    seconds = time.perf_counter() - started, time.process_time() - busy
    to.send((*seconds, *sizes(model)))
    to.recv()
    dist.barrier()
    dist.destroy_process_group()


def sizes(model: nn.Module) -> tuple[int, int]:
    """Bytes held, and bytes of the largest block."""
    tensors = [*model.parameters(), *model.buffers()]
    held = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)
    blocks = [sum(p.nbytes for p in b.parameters()) for b in find_blocks(model).values()]
    return held, max(*blocks, *(p.nbytes for p in model.parameters()))


def resident(process: int) -> tuple[int, int]:
    """Bytes of RssAnon and of RssFile."""
    text = Path(f"/proc/{process}/status").read_text()
    lines = dict(line.split(":", 1) for line in text.splitlines())
    anonymous, mapped = (int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))
    return anonymous, mapped


def measure(arm: str, method: str, path: Path, workers: int) -> list[dict[str, float]]:
    """What each worker held, needed and took."""
    context = mp.get_context("spawn")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes, ends = [], []
    for rank in range(workers):
        ours, theirs = context.Pipe()
        target = (rank, workers, port, arm, method, str(path), theirs)
        processes.append(context.Process(target=worker, args=target))
        processes[-1].start()
        ends.append(ours)
    pids = [process.pid or 0 for process in processes]
    for end in ends:
        assert end.recv() == "idle"
    idle = [resident(pid) for pid in pids]
    for end in ends:
        end.send("go")
    peaks, answers = watch(pids, ends, idle)
    for end in ends:
        end.send("end")
    for process in processes:
        process.join()
    return [
        {
            "peak": peaks[rank][0] - idle[rank][0],
            "mapped": peaks[rank][1] - idle[rank][1],
            **dict(zip(("seconds", "cpu_seconds", "shard", "block"), answer, strict=True)),
        }
        for rank, answer in answers.items()
    ]


def watch(
    pids: list[int], ends: list[Connection], idle: list[tuple[int, int]]
) -> tuple[list[tuple[int, int]], dict[int, tuple[float, float, int, int]]]:
    """The most that every worker had until all had answered, and the answers."""
    peaks = list(idle)
    answers: dict[int, tuple[float, float, int, int]] = {}
    while len(answers) < len(ends):
        for rank, (pid, end) in enumerate(zip(pids, ends, strict=True)):
            now = resident(pid)
            peaks[rank] = max(peaks[rank][0], now[0]), max(peaks[rank][1], now[1])
            if rank not in answers and end.poll():
                answers[rank] = end.recv()
        time.sleep(0.002)
    return peaks, answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument(
        "--whole", type=int, default=1, help="the most workers that hold a float32 copy each"
    )
    parser.add_argument("--directory", type=Path, help="keeps the model there; default: temporary")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        path = arguments.directory or Path(temporary)
        path.mkdir(exist_ok=True)
        if not (path / "model.safetensors.index.json").exists():
            print(f"{write_model(path, arguments.layers) / 1e9:.2f}B parameters", flush=True)
        print(
            "| method | workers | arm | shard | block | peak | peak / bound | mapped | s | CPU s |"
        )
        print("|---" * 10 + "|")
        for method in arguments.methods:
            for workers in arguments.workers:
                for arm in ("parts", "from_pretrained"):
                    if arm == "from_pretrained" and method == "full" and workers > arguments.whole:
                        continue
                    found = measure(arm, method, path, workers)
                    worst = max(found, key=lambda one: one["peak"])
                    times = [max(one[k] for one in found) for k in ("seconds", "cpu_seconds")]
                    bound = ALLOWED * (worst["shard"] + worst["block"])
                    failed |= arm == "parts" and worst["peak"] > bound
                    cells = [f"{worst[key] / MB:.0f}" for key in ("shard", "block", "peak")]
                    cells += [f"{worst['peak'] / bound:.2f}", f"{worst['mapped'] / MB:.0f}"]
                    cells = [method, str(workers), arm, *cells, *(f"{t:.1f}" for t in times)]
                    print(f"| {' | '.join(cells)} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
