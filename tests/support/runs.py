"""Small whole runs in this process, or in one of several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from raytune_ft.checkpoints.store import CheckpointStore
from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prompts import prompted
from raytune_ft.evaluate.precompute import referenced, taught
from raytune_ft.model.load import load_tokenizer
from raytune_ft.records import EvalMetrics, RunResult, StepMetrics
from raytune_ft.rundir import RunSpec
from raytune_ft.tensors.read import open_shards
from raytune_ft.train.report import Silent
from raytune_ft.train.run import run_training
from raytune_ft.train.stopping import Host
from tests.support.models import save_tiny_llama


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Prompts and completions of very different lengths, so that layouts differ."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz ,."))

    def text(low: int, high: int) -> str:
        return "x" + "".join(rng.choice(letters, int(rng.integers(low, high))))

    rows = [{"prompt": text(1, 20), "completion": text(1, 24)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(model: Path, data: Path, changes: Mapping[str, Any] | None = None) -> Config:
    """A config for the tiny model; `changes` maps dotted keys to values."""
    plain: dict[str, Any] = {
        "name": "run",
        "model": {"path": str(model)},
        "method": {"name": "lora", "rank": 4},
        "data": {"train": {"path": str(data)}, "validation": 0.2},
        "train": {
            "precision": "float32",
            "batch_size": 7,
            "lr": 3e-3,
            "warmup_fraction": 0.1,
            "weight_decay": 0.01,
            "max_examples": 7 * 40 - 3,  # 40 steps, several epochs, and a last step of 4
            "eval_every_examples": 70,
        },
        "checkpoint": {"every_examples": 50},
    }
    for dotted, value in (changes or {}).items():
        section = plain
        *path, key = dotted.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[key] = value
    return Config.model_validate(plain)


def make_inputs(directory: Path, examples: int = 60) -> tuple[Path, Path]:
    """A tiny Llama and a file of rows."""
    directory.mkdir(parents=True, exist_ok=True)
    return save_tiny_llama(directory / "model"), write_rows(directory / "rows.jsonl", examples)


def run(
    config: Config,
    run_dir: Path,
    strategy: str = "single",
    reporter: Silent | None = None,
    resumes: bool = False,
    host: Host | None = None,
) -> RunResult:
    """Prepare the data and train; called on every rank.

    `resumes`: there is a sound checkpoint, and the run goes on from it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(config.model)
    prepared = prepare_data(config.data, tokenizer, config.seed, run_dir.parent / "cache")
    prepared = prompted(config, prepared, tokenizer)
    prepared = taught(config, prepared, lambda line: None)
    prepared = referenced(config, prepared, lambda line: None)
    spec = RunSpec(config, run_dir, prepared.path)
    if not resumes:
        return run_training(spec, strategy, reporter or Silent(), host)
    _, newest = CheckpointStore(run_dir / "checkpoints").list()[-1]
    heard = Recorder()
    result = run_training(spec, strategy, heard)
    assert heard.steps[0].step == newest.step + 1
    return result


@dataclass
class Recorder(Silent):
    """Keeps what it hears; `fail_at` breaks the run there, as a lost process would."""

    fail_at: int | None = None
    steps: list[StepMetrics] = field(default_factory=list)
    evaluations: list[tuple[EvalMetrics, str | None]] = field(default_factory=list)

    def step(self, metrics: StepMetrics) -> None:
        if metrics.step == self.fail_at:
            raise BrokenRun
        self.steps.append(metrics)

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        self.evaluations.append((metrics, checkpoint))


class BrokenRun(Exception):
    """Raised on purpose."""


def losses(run_dir: Path) -> list[float]:
    """Training losses in `metrics.jsonl`, in the order of the steps."""
    return [line["loss"] for line in metrics(run_dir) if "loss" in line]


def evaluations(run_dir: Path) -> list[float]:
    """Evaluation losses in `metrics.jsonl`."""
    return [line["eval_loss"] for line in metrics(run_dir) if "eval_loss" in line]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def final_weights(run_dir: Path) -> dict[str, Tensor]:
    """Trained weights of the last checkpoint, in master precision."""
    last = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    CheckpointStore(last.parent).verify(last)
    with open_shards(last / "state", "model") as weights:
        return {name: weights.whole(name) for name in weights.shapes}


def largest_difference(a: Path, b: Path) -> tuple[float, float, float]:
    """Between two runs: of training losses, evaluation losses and final weights."""
    weights_a, weights_b = final_weights(a), final_weights(b)
    assert weights_a.keys() == weights_b.keys()
    assert len(losses(a)) == len(losses(b)) > 0
    assert len(evaluations(a)) == len(evaluations(b)) > 0
    return (
        max(abs(x - y) for x, y in zip(losses(a), losses(b), strict=True)),
        max(abs(x - y) for x, y in zip(evaluations(a), evaluations(b), strict=True)),
        max((weights_a[k].double() - weights_b[k].double()).abs().max().item() for k in weights_a),
    )
