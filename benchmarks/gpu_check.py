"""What only a GPU can show: the laws of docs/exactness.md on it, waiting, memory and speed.

    python benchmarks/gpu_check.py --shared ../shared --out gpu
    python benchmarks/gpu_check.py --shared ../shared --out tried --device cpu --tiny

One process, without Ray; under nine minutes on one card. Each phase adds a line of JSON to
`OUT/gpu_check.jsonl` as it ends, also where it fails, and the table is printed last; the exit code
is 1 where a law does not hold or a phase failed. Models have random weights; rows are those of
GSM8K, by a tokenizer of 512 tokens. `--tiny` takes a model of 2 layers for all shapes, which tries
the script itself.

- env: versions, the card, the order of torch's attention kernels, its rates;
- law: gradients of one step in several layouts against float64 on the CPU; packed slots against
  single runs; the same bits twice under `train.deterministic`;
- syncs: how often the host waits for the device in a micro-step, 0 is wanted;
- plans: milliseconds of micro-batches whose shapes are new and known, with and without cuDNN;
- probe: whether packing stays on for real shapes in bfloat16;
- snapshot: a checkpoint's copy, its time and that later steps do not reach it;
- memory: what `plan` predicts against what the allocator saw;
- packing: tokens a second of 1 to 16 LoRA trials on one base;
- throughput: non-pad tokens a second and the share of the card's peak (MFU), ours and TRL's best.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import PreparedData
from raytune_ft.estimate.hardware import ACCELERATORS, measure
from raytune_ft.estimate.memory import MemoryModel, work_of
from raytune_ft.estimate.parameters import build_shell
from raytune_ft.model.load import load_tokenizer
from raytune_ft.model.meta import build, build_shapes
from raytune_ft.packed.engine import PackedEngine, Passes
from raytune_ft.packed.lora import init_adapter
from raytune_ft.packed.optim import Step
from raytune_ft.records import Progress, StepMetrics
from raytune_ft.rundir import RunSpec
from raytune_ft.strategy import build_strategy
from raytune_ft.train.checkpoint import SnapshotTaker
from raytune_ft.train.loop import accumulate_gradients
from raytune_ft.train.material import Work
from raytune_ft.train.model_runner import ModelRunner
from raytune_ft.train.optim import build_optimizer
from raytune_ft.train.report import Silent
from raytune_ft.train.run import run_training
from raytune_ft.train.setup import build_objective, build_runner, order_of

MINUTES = 9.0
RANK, BATCH, MAX_LENGTH = 16, 16, 512
SECONDS = {"throughput": 20.0, "packing": 4.0}
TINY = ("llama", 512, 256, 512, 2, 4, 2)
SHAPES = {  # family, vocabulary, hidden, intermediate, layers, heads, heads of keys and values
    "tiny": TINY,
    "0.5B": ("qwen2", 151_936, 896, 4864, 24, 14, 2),
    "1.5B": ("qwen2", 151_936, 1536, 8960, 28, 12, 2),
    "8B": ("llama", 128_256, 4096, 14_336, 32, 32, 8),
}
BOUNDS = {"float64": 1e-9, "float32": 1e-5}
"""Of a gradient's relative error; in bfloat16 twice what a CPU shows."""


@dataclass
class Bench:
    """What all phases use; `left()` is the time until the deadline in seconds."""

    device: str
    tiny: bool
    shared: Path
    folder: Path
    ends: float

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.ends - time.monotonic()

    @cached_property
    def rows(self) -> Path:
        """Problems of GSM8K."""
        lines = (self.shared / "data/gsm8k/train.jsonl").read_text().splitlines(keepends=True)
        file = self.folder / "rows.jsonl"
        file.write_text("".join(lines[: 256 if self.tiny else 4096]))
        return file

    @cached_property
    def pairs(self) -> dict[str, str]:
        """The source of pairs: the answer of a problem, and that of the next one."""
        rows = [json.loads(line) for line in self.rows.read_text().splitlines()]
        file = self.folder / "pairs.jsonl"
        with file.open("w") as out:
            for row, other in pairwise(rows):
                answers = {"chosen": row["answer"], "rejected": other["answer"]}
                out.write(json.dumps({"prompt": row["question"], **answers}) + "\n")
        return {"path": str(file), "format": "preference"}

    def base(self, shape: str) -> Path:
        """A model directory of that shape, written once."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        folder = self.folder / ("tiny" if self.tiny else shape)
        if folder.is_dir():
            return folder
        family, vocabulary, hidden, wide, layers, heads, shared = (
            TINY if self.tiny else SHAPES[shape]
        )
        config = AutoConfig.for_model(
            family,
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=wide,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=shared,
            max_position_embeddings=4096,
        )
        torch.manual_seed(0)
        dtype = torch.float32 if shape == "tiny" else torch.bfloat16
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(self.shared / "models/stories260k").save_pretrained(folder)
        return folder

    def config(self, shape: str, device: str | None = None, **changes: Any) -> Config:
        """One run; `train__lr=1.0` is `train.lr`."""
        source = {"path": str(self.rows), "prompt": "question", "completion": "answer"}
        device = device or self.device
        plain: dict[str, Any] = {
            "name": "check",
            "model": {"path": str(self.base(shape))},
            "method": {"name": "lora", "rank": RANK},
            "data": {"train": source, "validation": 0.01, "max_length": MAX_LENGTH},
            "train": {
                "batch_size": BATCH,
                "lr": 2e-4,
                "lr_schedule": "constant",
                "eval_every_examples": 10**9,
            },
            "checkpoint": {"every_examples": 10**9},
            "parallel": {"resources_per_worker": {"CPU": 1, "GPU": int(device == "cuda")}},
        }
        for key, value in changes.items():
            section, name = key.split("__") if "__" in key else ("", key)
            (plain[section] if section else plain)[name] = value
        return Config.model_validate(plain)

    def data(self, config: Config) -> PreparedData:
        """The tokens of `config`."""
        tokenizer = load_tokenizer(config.model)
        return prepare_data(config.data, tokenizer, config.seed, self.folder / "cache")

    def spec(self, config: Config, name: str) -> RunSpec:
        """A new run directory."""
        folder = self.folder / "runs" / f"{name}-{time.monotonic_ns()}"
        folder.mkdir(parents=True)
        return RunSpec(config, folder, self.data(config).path)

    def runner(self, config: Config) -> tuple[ModelRunner, PreparedData]:
        """The model as a run has it at its start."""
        data = self.data(config)
        train = config.train
        strategy = build_strategy("single", config.parallel, train.precision, train.deterministic)
        built = build(
            config.model, config.method, train.precision, config.seed, strategy.takes_parts, None
        )
        objective = build_objective(config, data, strategy)
        optimizer_of = partial(build_optimizer, train=train)
        runner = build_runner(built, config, strategy, optimizer_of, objective, data.extent)
        return runner, data

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


Rows = list[dict[str, Any]]


def env(bench: Bench) -> Rows:
    """Versions and rates."""
    import transformers

    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    found["TFLOP/s bf16"], found["GB/s"] = map(
        partial(round, ndigits=3), measure(bench.device, "bfloat16")
    )
    if bench.device == "cuda":
        found |= {
            "card": torch.cuda.get_device_name(),
            "cudnn": torch.backends.cudnn.version(),
            "order of attention": str(getattr(torch._C, "_get_sdp_priority_order", lambda: "")()),
        }
    return [found]


def law(bench: Bench) -> Rows:
    """Gradients in every layout against float64; slots against single runs; the same bits."""
    found: Rows = []
    # Answers of a pair share their prompt in packed rows.
    pairs: dict[str, Any] = {"train__objective": "orpo", "data__train": bench.pairs}
    for objective, method, task in (
        ("sft", {"name": "lora", "rank": 4}, {}),
        ("sft", {"name": "full"}, {}),
        ("orpo", {"name": "lora", "rank": 4}, pairs),
    ):
        asked = {"method": method, **task}
        truth = gradients(bench, device="cpu", train__precision="float64", **asked)
        narrow = gradients(bench, device="cpu", train__precision="bfloat16", **asked)
        bounds = {**BOUNDS, "bfloat16": 2 * error(narrow, truth)}
        if task:  # norms in float32 round the sum of what both answers send back to a prompt
            bounds["float64"] = 1e-7
        for precision, bound in bounds.items():
            for layout in (
                {"data__packing": False, "train__micro_tokens": 256},
                {"train__micro_tokens": 256},
                {"train__micro_tokens": 4096},
                {"parallel__activation_checkpointing": "selective"},
                {"parallel__activation_checkpointing": "full"},
            ):
                got = gradients(bench, train__precision=precision, **asked, **layout)
                off = error(got, truth)
                name = ", ".join(f"{key.split('__')[1]} {value}" for key, value in layout.items())
                what = f"gradient, {objective}, {method['name']}, {precision}, {name}"
                found.append({"what": what, "error": off, "bound": bound, "holds": off <= bound})
    return [*found, slots_against_single(bench), same_bits(bench)]


def gradients(bench: Bench, device: str | None = None, **changes: Any) -> dict[str, Tensor]:
    """Those of the first step of the tiny model, in float64 on the host."""
    parallel = changes.pop("parallel__activation_checkpointing", "none")
    config = bench.config("tiny", device, **changes)
    layout = config.parallel.model_copy(update={"activation_checkpointing": parallel})
    config = config.model_copy(update={"parallel": layout})
    runner, data = bench.runner(config)
    trained = {n: p for n, p in runner.model.named_parameters() if p.requires_grad}
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(trained.items()):
            if "lora_B" in name:  # else the gradients of A are zero
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draws))
    indices = order_of(config, data).indices(0, BATCH)
    batches = runner.micro_batches(data.train, indices)
    accumulate_gradients(runner, Work.of(data.train, indices, batches))
    return {n: p.grad.double().cpu() for n, p in trained.items() if p.grad is not None}


def error(got: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor."""
    assert got.keys() == truth.keys()
    return max(
        float((got[name] - tensor).norm() / tensor.norm().clamp(min=1e-12))
        for name, tensor in truth.items()
    )


def slots_against_single(bench: Bench) -> dict[str, Any]:
    """Three packed runs of 8 steps, and each by itself."""
    losses: dict[str, list[list[float]]] = {"packed": [], "single": []}
    settings = [{"rank": 4, "lr": 1e-3}, {"rank": 8, "lr": 3e-3}, {"rank": 16, "lr": 1e-4}]
    configs = [
        bench.config(
            "tiny",
            method={"name": "lora", "rank": each["rank"]},
            train__lr=each["lr"],
            train__precision="float32",
            train__max_examples=8 * BATCH,
        )
        for each in settings
    ]
    for config in configs:
        spec = bench.spec(config, "single")
        run_training(spec, "single", Silent())
        losses["single"].append(read_losses(spec))
    strategy = build_strategy("single", configs[0].parallel, "float32")
    engine = PackedEngine(Passes(configs[0], bench.data(configs[0]), 3, 16, strategy))
    specs = [bench.spec(config, "packed") for config in configs]
    for spec in specs:
        engine.enter(spec, Silent())
    ended: list[Path] = []
    while len(ended) < len(specs):
        ended += engine.advance()
    engine.close()
    losses["packed"] = [read_losses(spec) for spec in specs]
    off = max(
        abs(a - b)
        for one, other in zip(losses["single"], losses["packed"], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    return {"what": "3 slots, each alone", "error": off, "bound": 1e-4, "holds": off <= 1e-4}


def read_losses(spec: RunSpec) -> list[float]:
    """Training losses of a run."""
    lines = (spec.run_dir / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def same_bits(bench: Bench) -> dict[str, Any]:
    """Two runs under `train.deterministic`."""
    config = bench.config("tiny", train__deterministic=True, train__max_examples=8 * BATCH)
    specs = [bench.spec(config, "bits") for _ in range(2)]
    try:
        for spec in specs:
            run_training(spec, "single", Silent())
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = map(read_losses, specs)
    return {"what": "the same bits twice", "error": float(one != other), "holds": one == other}


def syncs(bench: Bench) -> Rows:
    """Warnings of torch in one step, after one to warm up."""
    if bench.device != "cuda":
        return [{"note": "a CPU does not wait for itself"}]
    runner, data = bench.runner(bench.config("0.5B"))
    order = order_of(bench.config("0.5B"), data)
    for step in range(2):
        indices = order.indices(step * BATCH, BATCH)
        batches = runner.micro_batches(data.train, indices)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if step else "default")
            accumulate_gradients(runner, Work.of(data.train, indices, batches))
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(each.filename) + f":{each.lineno}" for each in heard]
    count = len(waits) / max(1, len(batches))
    return [{"what": "waits a micro-step", "count": count, "where": waits[:5], "holds": not waits}]


def plans(bench: Bench) -> Rows:
    """Ten micro-batches of lengths of their own: the first time, and again."""
    found: Rows = []
    for cudnn in (False, True) if bench.device == "cuda" else (False,):
        runner, data = bench.runner(bench.config("0.5B"))
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        if cudnn:  # as it would be without the kernel for rows of different lengths
            runner = replace(runner, varlen=None)
        indices = order_of(bench.config("0.5B"), data).indices(0, 10 * BATCH)
        times: list[list[float]] = []
        for _ in range(2):
            times.append([])
            for part in range(10):
                step = indices[part * BATCH : (part + 1) * BATCH]
                batches = runner.micro_batches(data.train, step)
                bench.wait()
                began = time.perf_counter()
                accumulate_gradients(runner, Work.of(data.train, step, batches))
                bench.wait()
                times[-1].append(1000 * (time.perf_counter() - began))
        torch.backends.cuda.enable_cudnn_sdp(False)
        new, known = (round(sum(each) / len(each), 1) for each in times)
        found.append({"cudnn": cudnn, "ms, new shapes": new, "ms, known shapes": known})
        release()
    return found


def probe(bench: Bench) -> Rows:
    """Whether packing stays on."""
    found: Rows = []
    for shape in ("1.5B", "8B"):
        runner, _ = bench.runner(bench.config(shape))
        notes = [note for note in runner.notes if "pack" in note or "attention" in note]
        found.append(
            {
                "model": shape,
                "packing": runner.packing,
                "varlen": runner.varlen is not None,
                "notes": notes,
                "holds": runner.packing,
            }
        )
        del runner
        release()
    return found


def snapshot(bench: Bench) -> Rows:
    """Two copies of a full fine-tune, and their bytes after five more steps."""
    config = bench.config("0.5B", method={"name": "full"})
    runner, data = bench.runner(config)
    taker = SnapshotTaker(runner.strategy, runner.names)
    runner.strategy.start_from(0)
    seconds: list[float] = []
    hashes: list[str] = []
    order = order_of(config, data)
    for _ in range(2):
        bench.wait()
        began = time.perf_counter()
        taken = taker.take(Progress())
        seconds.append(time.perf_counter() - began)
        parts = [part.values for kept in (taken.weights, taken.moments) for part in kept.values()]
        hashes.append(digest(parts))
    for step in range(5):
        indices = order.indices(step * BATCH, BATCH)
        batches = runner.micro_batches(data.train, indices)
        accumulate_gradients(runner, Work.of(data.train, indices, batches))
        runner.strategy.step(1e-4, 1.0)
    bench.wait()
    size = sum(values.nbytes for values in parts)
    return [
        {
            "GiB": round(size / 2**30, 2),
            "seconds, first": round(seconds[0], 2),
            "seconds, again": round(seconds[1], 2),
            "holds": digest(parts) == hashes[0] == hashes[1],
            "page-locked": all(values.is_pinned() for values in parts),
        }
    ]


def digest(tensors: Sequence[Tensor]) -> str:
    """Of their bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def memory(bench: Bench) -> Rows:
    """Predicted and seen peaks of a step."""
    if bench.device != "cuda":
        return [{"note": "benchmarks/plan_accuracy.py does this on a CPU"}]
    found: Rows = []
    for method in ({"name": "lora", "rank": RANK}, {"name": "full"}):
        for checkpointing in ("none", "selective", "full"):
            config = bench.config("1.5B", method=method)
            parallel = config.parallel.model_copy(
                update={"activation_checkpointing": checkpointing, "strategy": "single"}
            )
            config = config.model_copy(update={"parallel": parallel})
            runner, data = bench.runner(config)
            work = work_of(config, data.train, 1, "cuda")
            shell = build_shell(config.model, config.method, config.train.precision)
            model = MemoryModel(shell, (work.rows,), work.width)
            planned = model.estimate(parallel, work, "cuda", saves_midway=False).peak
            torch.cuda.reset_peak_memory_stats()
            order = order_of(config, data)
            for step in range(3):
                indices = order.indices(step * BATCH, BATCH)
                batches = runner.micro_batches(data.train, indices)
                accumulate_gradients(runner, Work.of(data.train, indices, batches))
                runner.strategy.step(1e-4, 1.0)
            seen = torch.cuda.max_memory_allocated()
            ratio = planned / seen
            found.append(
                {
                    "what": f"{method['name']}, checkpointing {checkpointing}",
                    "plan, GiB": round(planned / 2**30, 2),
                    "seen, GiB": round(seen / 2**30, 2),
                    "plan / seen": round(ratio, 3),
                    "holds": 0.9 <= ratio <= 1.1,
                }
            )
            del runner, model
            release()
    return found


def packing(bench: Bench) -> Rows:
    """Tokens a second of several adapters in one pass."""
    found: Rows = []
    config = bench.config("0.5B", train__batch_size=8)
    data = bench.data(config)
    strategy = build_strategy("single", config.parallel, config.train.precision)
    passes = Passes(config, data, 16, RANK, strategy)
    assert isinstance(config.method, LoraMethod)
    adapter = init_adapter(passes.shapes, config.method, config.train.precision, config.seed)
    passes.stack.adapt(list(adapter.layers))
    passes.optimizer.widen(passes.stack.numbers)
    order = order_of(config, data)
    for count in (1, 2, 4, 8, 16):
        active = passes.active_adapters(0, [adapter] * count)
        tokens, began = 0, time.perf_counter()
        for number in range(10**6):
            if number == 2:  # after the warm-up
                bench.wait()
                tokens, began = 0, time.perf_counter()
            elif number > 2 and time.perf_counter() - began > SECONDS["packing"]:
                break
            at = number * 8 * count
            objective, slots = passes.runner.objective, range(count)
            works = [Work.of(data.train, order.indices(at + 8 * n, 8), ()) for n in slots]
            steps = [passes.open(objective, work) for work in works]
            tokens += sum(step.waiting_tokens for step in steps)
            while any(step.waiting_widths for step in steps):
                plan = passes.plan(steps)
                took = len(plan.rows)
                some = active if took == count else passes.active_adapters(0, [adapter] * took)
                passes.accumulate(plan, steps[:took], some)
                steps.sort(key=lambda step: not step.waiting_widths)
            passes.optimizer.step([Step(slot, 0.0, config.train) for slot in range(count)])
        bench.wait()
        rate = tokens / (time.perf_counter() - began)
        one = found[0]["tokens/s"] if found else rate
        found.append({"slots": count, "tokens/s": round(rate), "gain": round(rate / one, 2)})
    return found


class EnoughSteps(Exception):
    """The time of an arm is over."""


class Clock(Silent):
    """Counts tokens after three steps, and ends the run after `seconds` of them."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.tokens, self.spent, self.steps = seconds, 0, 0.0, 0

    def step(self, metrics: StepMetrics) -> None:
        self.steps += 1
        if self.steps > 3:
            self.tokens += metrics.tokens
            self.spent += metrics.tokens / metrics.tokens_per_s
        if self.spent > self.seconds:
            raise EnoughSteps


def throughput(bench: Bench) -> Rows:
    """Ours and TRL's best on the same rows."""
    found: Rows = []
    cells = [("1.5B", "lora"), ("8B", "lora"), ("1.5B", "full")]
    for shape, method in cells:
        if bench.left() < 60:
            found.append({"model": shape, "method": method, "note": "no time was left"})
            continue
        seconds = min(SECONDS["throughput"], bench.left() / 8) if not bench.tiny else 2.0
        for arm, run in (("ours", ours), ("trl", trl)):
            if arm == "trl" and importlib.util.find_spec("trl") is None:
                found.append({"model": shape, "method": method, "note": "trl is not installed"})
                continue
            row = {
                "model": shape,
                "method": method,
                "arm": arm,
                **run(bench, shape, method, seconds),
            }
            found.append(row)
            release()
    return found


def ours(bench: Bench, shape: str, method: str, seconds: float) -> dict[str, Any]:
    """The ordinary loop with its defaults."""
    settings = {"name": "lora", "rank": RANK} if method == "lora" else {"name": "full"}
    config = bench.config(shape, method=settings, train__max_examples=10**9)
    clock = Clock(seconds)
    with peak(bench) as used, suppress(EnoughSteps):
        run_training(bench.spec(config, "ours"), "single", clock)
    return {**rate(bench, shape, method, clock.tokens / max(clock.spent, 1e-9)), **used}


def trl(bench: Bench, shape: str, method: str, seconds: float) -> dict[str, Any]:
    """`SFTTrainer` in bfloat16, with the micro-batch that is fastest: doubled until memory ends."""
    best: dict[str, Any] = {}
    micro = 4
    while micro <= BATCH:
        try:
            with peak(bench) as used:
                tokens_per_s = trl_once(bench, shape, method, seconds / 3, micro)
        except torch.OutOfMemoryError:
            break
        finally:
            release()
        if tokens_per_s > best.get("tokens/s", 0):
            best = {**rate(bench, shape, method, tokens_per_s), **used, "micro-batch": micro}
        micro *= 2
    return best


def trl_once(bench: Bench, shape: str, method: str, seconds: float, micro: int) -> float:
    """Non-pad tokens a second of one setting."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    base = bench.base(shape)
    rows = load_dataset("json", data_files=str(bench.rows), split="train").map(
        lambda row: {"prompt": row["question"] + "\n", "completion": row["answer"]},
        remove_columns=["question", "answer"],
    )
    counts: list[int] = []

    class Watch(TrainerCallback):
        began, first, spent, tokens = 0.0, 0, 0.0, 0

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            bench.wait()
            if state.global_step == 3:
                self.began, self.first = time.perf_counter(), len(counts)
            elif state.global_step > 3:
                self.spent = time.perf_counter() - self.began
                self.tokens = sum(counts[self.first : (BATCH // micro) * state.global_step])
                control.should_training_stop = self.spent > seconds

    watch = Watch()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16 if method == "lora" else torch.float32
        ),
        args=SFTConfig(
            output_dir=str(bench.folder / "trl"),
            max_steps=10**5,
            learning_rate=2e-4,
            max_length=MAX_LENGTH,
            bf16=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=BATCH // micro,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=bench.device == "cpu",
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        if method == "lora"
        else None,
        callbacks=[watch],
    )
    collate = trainer.data_collator

    def counting(examples: list[Any]) -> Any:
        batch = collate(examples)
        counts.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    return watch.tokens / max(watch.spent, 1e-9)


def rate(bench: Bench, shape: str, method: str, tokens_per_s: float) -> dict[str, Any]:
    """Tokens a second, and the share of the card's peak that their products are."""
    found: dict[str, Any] = {"tokens/s": round(tokens_per_s)}
    card = torch.cuda.get_device_name() if bench.device == "cuda" else ""
    peaks = [each.bfloat16 for name, each in ACCELERATORS.items() if name.split("-")[0] in card]
    if peaks:
        shapes = build_shapes(bench.config(shape).model)
        weights = sum(parameter.numel() for parameter in shapes.parameters())
        flops = (4 if method == "lora" else 6) * weights
        found["mfu"] = round(flops * tokens_per_s / (peaks[0] * 1e12), 3)
    return found


@contextmanager
def peak(bench: Bench) -> Iterator[dict[str, float]]:
    """Fills in `peak, GiB` of the device at its end."""
    found: dict[str, float] = {}
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    if bench.device == "cuda":
        found["peak, GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)


def release() -> None:
    """Give memory of dropped models back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PHASES: dict[str, Callable[[Bench], Rows]] = {
    "env": env,
    "law": law,
    "syncs": syncs,
    "plans": plans,
    "snapshot": snapshot,
    "packing": packing,
    "probe": probe,
    "memory": memory,
    "throughput": throughput,
}


def main() -> int:
    """Run the phases in turn; 1 where one failed or a law does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to try this script")
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    settings = parser.parse_args()
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; write --device cpu --tiny to try the script")
    if settings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    folder = settings.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        settings.device, settings.tiny, settings.shared, folder, time.monotonic() + 60 * MINUTES
    )
    results: dict[str, Rows] = {}
    with (folder / "gpu_check.jsonl").open("a", encoding="utf-8") as file:
        for name in settings.phases:
            began = time.monotonic()
            try:
                rows = PHASES[name](bench)
            except Exception as failure:  # noqa: BLE001 - the other phases still run
                traceback.print_exc()
                rows = [{"what": f"{type(failure).__name__}: {failure}"[:300], "holds": False}]
            results[name] = rows
            seconds = round(time.monotonic() - began, 1)
            line = {"phase": name, "seconds": seconds, "rows": rows}
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"{name}: {seconds} s", file=sys.stderr)
            release()
    print_table(results)
    return int(any(row.get("holds") is False for rows in results.values() for row in rows))


def print_table(results: dict[str, Rows]) -> None:
    """A Markdown table for each phase."""
    for name, rows in results.items():
        keys = list(dict.fromkeys(key for row in rows for key in row))
        print(f"\n{name}\n\n| {' | '.join(keys)} |\n|{'---|' * len(keys)}")
        for row in rows:
            print(f"| {' | '.join(_cell(row.get(key, '')) for key in keys)} |")


def _cell(value: Any) -> str:
    return f"{value:.2e}" if isinstance(value, float) and 0 < abs(value) < 1e-2 else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
