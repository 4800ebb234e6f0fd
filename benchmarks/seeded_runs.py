"""Seeded float32 runs through the command line: two trees of the code must give the same bits.

    python benchmarks/seeded_runs.py --json before.json
    python benchmarks/seeded_runs.py --against before.json

Short runs of the built-in model: sft by LoRA and by all weights, classification and kd, each under
`single`, `ddp` and `fsdp`, and packed sweeps. The line of a run has a hash over the numbers of
`metrics.jsonl` without times, a hash over all tensors of its last checkpoint, moments included, its
last loss and its last `eval_loss`. With `--against`, the first number and the first tensor that
differ are named for each run, and the exit code is 1. If a run fails, its output is printed and the
other runs go on.

The script uses the command line, the config and the files of a run alone, so that code may move.
Two runs on one machine with the same libraries are equal bit for bit: one thread a worker, and
checkpoints that are written in turn. A packed sweep has one engine with a slot for every trial, no
scheduler and a fixed list of points. All trials must wait when the engine begins its first pass;
otherwise they would share other passes. So the sweep joins a Ray cluster of this script, whose CPUs
are reserved until every trial has started. If a trial was late all the same, which its times show,
the sweep is repeated under another name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors import safe_open

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",  # trials of a sweep start in order
}
CPUS = "RAY_OVERRIDE_RESOURCES"
"""What a Ray that is started claims to have, whatever the machine is."""
COUNTED = ("step", "examples", "tokens", "label_tokens", "loss", "lr", "grad_norm")
TRIES = 4
"""Of a packed sweep, until all of its trials come in time."""
SETTLE_S = 8.0
"""What the last trial of a sweep may take from its directory to its place in the queue."""

TRAIN: Json = {
    "batch_size": 7,
    "max_examples": 80,
    "eval_every_examples": 40,
    "lr": 2e-3,
    "lr_schedule": "cosine",
    "warmup_fraction": 0.2,
    "weight_decay": 0.01,
    "precision": "float32",
}
LORA: Json = {"name": "lora", "rank": 8, "alpha": 16}
KD: Json = {"teacher": "builtin:tiny", "temperature": 2.0, "weight": 0.5}
SFT_TRAIN = TRAIN | {"objective": "sft"}
KD_TRAIN = TRAIN | {"objective": "kd", "kd": KD}
CLASS_TRAIN = TRAIN | {"objective": "classification", "class_weights": "balanced"}

KINDS: dict[str, Json] = {
    "lora": {"method": LORA, "train": SFT_TRAIN},
    "full": {"method": {"name": "full"}, "train": SFT_TRAIN | {"lr": 1e-3}},
    "classification": {"method": LORA, "train": CLASS_TRAIN},
    "kd": {"method": LORA, "train": KD_TRAIN},
    "kd-disk": {"method": LORA, "train": KD_TRAIN | {"kd": KD | {"cache": "disk"}}},
}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ("lora", "full", "classification", "kd", "kd-disk")),
    "ddp": (2, ("lora", "full", "classification", "kd")),
    "fsdp": (2, ("lora", "full", "classification", "kd")),
}
"""Workers, and what is trained."""
PACKED: dict[str, tuple[str, int, str]] = {
    "packed lora": ("single", 1, "lora"),
    "packed kd": ("single", 1, "kd"),
    "packed-ddp lora": ("ddp", 2, "lora"),
    "packed-fsdp lora": ("fsdp", 2, "lora"),
}
"""Strategy and workers of the engine, and what is trained."""
POINTS: list[Json] = [
    {"train.lr": 1e-3, "method.rank": 4, "train.batch_size": 7},
    {"train.lr": 3e-3, "method.rank": 8, "train.batch_size": 12},
    {"train.lr": 2e-3, "method.rank": 16, "train.batch_size": 5},
    {"train.lr": 5e-3, "method.rank": 8, "train.batch_size": 9},
]
"""Of the trials of a packed sweep."""


def main() -> None:
    """Print a line for each run; exit with 1 where one differs from the earlier ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all numbers and hashes to this file")
    parser.add_argument("--against", type=Path, help="compare with such a file of an earlier run")
    parser.add_argument("--only", nargs="*", metavar="TEXT", help="runs with this in their label")
    parser.add_argument(
        "--tree", type=Path, default=ROOT, help="root of the code, default: that of this file"
    )
    parser.add_argument("--keep", type=Path, help="keep what the runs leave in this new folder")
    options = parser.parse_args()
    earlier: Json | None = json.loads(options.against.read_text()) if options.against else None
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="seeded-runs-") as temporary:
        runner = Runner(options.tree.resolve(), Path(temporary))
        print(runner.package(), file=sys.stderr)
        found: Json = {}
        failed = 0
        runs = {label: run for label, run in runner.all_runs() if chosen(label, options.only)}
        for label, run in runs.items():
            try:
                for name, figures in run():
                    found[name] = figures
                    print(line_of(name, figures), flush=True)
            except (RunError, OSError, LookupError, ValueError) as error:
                failed += 1
                print(f"{label}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if options.keep:
            shutil.copytree(runner.storage, options.keep)
    print(f"{len(found)} lines in {time.monotonic() - begun:.0f} s", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if earlier is not None:
        begins = tuple(f"{label} " for label in runs)
        wanted = {label: each for label, each in earlier.items() if f"{label} ".startswith(begins)}
        failed += differences(wanted, found)
    sys.exit(1 if failed else 0)


def chosen(label: str, only: list[str] | None) -> bool:
    """Is a run asked for?"""
    return not only or any(text in label for text in only)


class RunError(Exception):
    """A run ended otherwise than it should."""


class Runner:
    """Runs configs with the code below `tree`; everything else lies in `folder`."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self._tree, self._folder, self.storage = tree, folder, folder / "runs"
        path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
        # In this process too, for the workers of a Ray that is started in it.
        os.environ.update(ENVIRONMENT | {"PYTHONPATH": path, CPUS: json.dumps({"CPU": 2})})
        os.environ.pop("RAY_ADDRESS", None)
        self._instructions = tree / "jobs" / "data" / "tiny_instructions" / "train.jsonl"
        self._classes = folder / "classes.jsonl"
        write_classes(self._instructions, self._classes)

    def package(self) -> str:
        """Where the code comes from."""
        command = [sys.executable, "-c", "import raytune_ft; print(raytune_ft.__file__)"]
        return self._run(command, {}).strip()

    def all_runs(self) -> Iterator[tuple[str, Callable[[], Iterator[tuple[str, Json]]]]]:
        """Labels, in turn, and what makes the run and has a label and figures for each line."""
        for layout, (workers, kinds) in LAYOUTS.items():
            for kind in kinds:
                label = f"{layout} {kind}"
                yield label, partial(self._alone, label, self._config(kind, layout, workers))
        for label, (strategy, workers, kind) in PACKED.items():
            config = self._config(kind, strategy, workers)
            yield label, partial(self._packed, label, config, workers)

    def _alone(self, label: str, config: Json) -> Iterator[tuple[str, Json]]:
        yield label, figures_of(self._started("train", label, config))

    def _packed(self, label: str, config: Json, workers: int) -> Iterator[tuple[str, Json]]:
        values = {key: sorted({point[key] for point in POINTS}) for key in POINTS[0]}
        config["search"] = {
            "execution": "packed",
            "trials": len(POINTS),
            "max_concurrent": len(POINTS),
            "sampler": "random",
            "scheduler": None,
            "defaults": False,
            "first": POINTS,
            "space": {key: {"choice": choice} for key, choice in values.items()},
        }
        for attempt in range(1, TRIES + 1):
            sweep = self._gathered(f"{label} {attempt}", config, workers)
            trials = sorted((sweep / "trials").iterdir())
            if all_at_once(trials):
                break
            print(f"{label}: a trial came late, and all are run again", file=sys.stderr)
        else:
            raise RunError(f"in {TRIES} sweeps some trial came late")
        drawn = {row["id"]: row["params"] for row in read_json(sweep / "result.json")["trials"]}
        for trial in trials:
            yield f"{label} {trial.name}", {"params": drawn[trial.name], **figures_of(trial)}
        yield f"{label} promoted", promoted_figures(sweep / "promoted")

    def _gathered(self, label: str, config: Json, workers: int) -> Path:
        """Run a sweep whose trials all wait before its engine can begin."""
        with reserved(workers) as (address, release), ThreadPoolExecutor(1) as pool:
            sweep = pool.submit(self._started, "sweep", label, config, RAY_ADDRESS=address)
            trials = self.storage / name_of(label) / "trials"
            while not sweep.done() and len(list(trials.glob("*/config.yaml"))) < len(POINTS):
                time.sleep(0.2)
            if not sweep.done():
                time.sleep(SETTLE_S)
            release()
            return sweep.result()

    def _config(self, kind: str, strategy: str, workers: int) -> Json:
        if kind == "classification":
            source: Json = {"path": str(self._classes), "format": "classification"}
        else:
            source = {"path": str(self._instructions)}
            source |= {"prompt": "instruction", "completion": "response"}
        return {
            "seed": 11,
            "storage": str(self.storage),
            "model": {"path": "builtin:tiny"},
            **KINDS[kind],
            "data": {"train": source, "validation": 0.05, "max_length": 128},
            "parallel": {
                "strategy": strategy,
                "workers": workers,
                "resources_per_worker": {"CPU": 1, "GPU": 0},
                "max_failures": 0,
            },
            "checkpoint": {"asynchronous": False},
            "promote": {"top_k": 1},
            "tracking": {"to": []},
        }

    def _started(self, command: str, label: str, config: Json, **environment: str) -> Path:
        """Run a config to its end; returns its directory."""
        name = name_of(label)
        path = self._folder / f"{name}.yaml"
        path.write_text(json.dumps({"name": name, **config}), encoding="utf-8")  # also YAML
        self._run([sys.executable, "-m", "raytune_ft", command, str(path)], environment)
        status = read_json(self.storage / name / "result.json")["status"]
        if status != "completed":
            raise RunError(f"status {status}")
        return self.storage / name

    def _run(self, command: list[str], environment: Mapping[str, str]) -> str:
        done = subprocess.run(
            command, cwd=self._tree, env=os.environ | environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RunError(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout


@contextmanager
def reserved(cpus: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Start Ray and reserve all its `cpus` CPUs; yields its address and a function to free them."""
    before, os.environ[CPUS] = os.environ[CPUS], json.dumps({"CPU": cpus})
    quiet: Json = {"log_to_driver": False, "logging_level": logging.ERROR}
    ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    try:
        taken = placement_group([{"CPU": 1}] * cpus)
        ray.get(taken.ready())
        yield ray.get_runtime_context().gcs_address, lambda: remove_placement_group(taken)
    finally:
        ray.shutdown()
        os.environ[CPUS] = before


def name_of(label: str) -> str:
    """Of a run's directory."""
    return label.replace(" ", "-")


def write_classes(instructions: Path, path: Path) -> None:
    """A set of three classes: instructions by the kind of their answer."""
    with instructions.open(encoding="utf-8") as lines, path.open("w", encoding="utf-8") as out:
        for line in lines:
            row = json.loads(line)
            answer = row["response"]
            label = "words" if not answer[:1].isdigit() else "list" if "," in answer else "number"
            out.write(json.dumps({"text": row["instruction"], "label": label}) + "\n")


def all_at_once(trials: list[Path]) -> bool:
    """Were all trials in their slots before the first of them took a step? `metrics.jsonl` is made
    when a trial enters its slot, and has the seconds from then on.
    """
    entered, stepped = [], []
    for trial in trials:
        path = trial / "metrics.jsonl"
        told = subprocess.run(["stat", "-c", "%.W", path], capture_output=True, text=True)
        entered.append(float(told.stdout))
        first = next(row for row in read_lines(path) if row.get("wall_s") is not None)
        stepped.append(entered[-1] + first["wall_s"])
    if min(entered) == 0.0:
        print("no times of birth on this file system: not checked", file=sys.stderr)
    return max(entered) < min(stepped)


def figures_of(run: Path) -> Json:
    """What a run left, as far as a seed determines it."""
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    numbers = [dict(numbers_in(row)) for row in read_lines(run / "metrics.jsonl")]
    return {"numbers": numbers, "checkpoint": newest.name, "weights": weights_below(newest)}


def promoted_figures(folder: Path) -> Json:
    """What was promoted: its figures and its weights."""
    evaluation = read_json(folder / "evaluation.json")
    sides = [{"side": side, **evaluation[side]} for side in ("base", "promoted")]
    numbers = [dict(flat(each)) for each in sides]
    return {"numbers": numbers, "weights": weights_below(folder / "model")}


def numbers_in(row: Json) -> Iterator[tuple[str, Any]]:
    """Of a line of `metrics.jsonl`, without times and without what is null."""
    yield from flat({k: v for k, v in row.items() if k in COUNTED or k.startswith("eval_")})


def flat(row: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted keys, sorted, without what is null."""
    for key in sorted(row):
        value = row[key]
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value


def weights_below(folder: Path) -> dict[str, str]:
    """Hashes of all tensors below a folder, each with its name, dtype, shape and bytes."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name).contiguous()
                shape = list(tensor.shape)
                said = f"{name} {tensor.dtype} {shape} "
                data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                key = f"{path.relative_to(folder)}: {name}"
                found[key] = hashlib.sha256(said.encode() + data).hexdigest()[:16]
    return found


def line_of(label: str, figures: Json) -> str:
    """One line of text."""
    numbers, weights = figures["numbers"], figures["weights"]
    losses = [row["loss"] for row in numbers if "loss" in row]
    evals = [row["eval_loss"] for row in numbers if "eval_loss" in row]
    last = f"loss {losses[-1]!r}" if losses else ""
    return (
        f"{label:<28} numbers {hash_of(numbers)}  weights {hash_of(weights)}  "
        f"{last:<26} eval_loss {evals[-1]!r}"
    )


def hash_of(value: Any) -> str:
    """JSON has the `repr` of floats."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def differences(earlier: Json, found: Json) -> int:
    """How many runs differ; says where each of them does so first."""
    differ = 0
    for label in sorted(earlier.keys() | found.keys()):
        if label not in earlier or label not in found:
            told = [f"is only in the {'earlier' if label in earlier else 'present'} runs"]
        else:
            before, now = earlier[label], found[label]
            told = first_difference(dict(steps_of(before)), dict(steps_of(now)))
            told += first_difference(before["weights"], now["weights"])
        differ += bool(told)
        for text in told:
            print(f"{label}: {text}")
    total = len(earlier.keys() | found.keys())
    print(f"{differ} of {total} runs differ" if differ else f"all {total} runs are the same")
    return differ


def steps_of(figures: Json) -> Iterator[tuple[str, Any]]:
    """Numbers of a run by names that say where they stand."""
    for key, value in figures.get("params", {}).items():
        yield f"params {key}", value
    for index, row in enumerate(figures["numbers"], start=1):
        where = row.get("side") or f"line {index}, step {row.get('step')}"
        for key, value in row.items():
            yield f"{where}, {key}", value
    yield "checkpoint", figures.get("checkpoint")


def first_difference(before: Json, now: Json) -> list[str]:
    """At most one line."""
    for key in [*before, *(key for key in now if key not in before)]:
        if before.get(key) != now.get(key):
            return [f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"]
    return []


def read_json(path: Path) -> Json:
    """A file with one object."""
    found: Json = json.loads(path.read_text(encoding="utf-8"))
    return found


def read_lines(path: Path) -> list[Json]:
    """A file with one object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
