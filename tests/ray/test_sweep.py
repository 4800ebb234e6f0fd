"""A sweep on a real cluster: pruned, failed and resumed trials, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.util.placement_group import placement_group_table
from transformers import AutoModelForSequenceClassification

from raytune_ft.config.load import dump_yaml, load_config
from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.errors import ClusterError, Interrupted
from raytune_ft.model.load import load_tokenizer
from raytune_ft.promote.promote import promote
from raytune_ft.ray_backend.sweep import run_sweep
from raytune_ft.search.sampler import JointSampler
from raytune_ft.search.space import distributions
from raytune_ft.search.study import open_study
from tests.ray.conftest import Inputs, assert_nothing_left, processes, workers
from tests.support.models import save_tiny_encoder
from tests.support.runs import largest_difference, make_config, run

pytestmark = pytest.mark.ray

SEARCH = {
    "trials": 3,
    "execution": "isolated",
    "scheduler": {"name": "asha", "grace_examples": 70, "reduction_factor": 2},
    "space": {"train.lr": {"log_uniform": [1e-9, 1e30]}},
}
GOOD, BAD, EXPLODING = 1e-2, 1e-8, 1e29


def begin(inputs: Inputs, sweep_dir: Path, **changes: Any) -> Config:
    config = inputs.config(**{"search": SEARCH, "train__max_grad_norm": None, **changes})
    sweep_dir.mkdir()
    (sweep_dir / "config.yaml").write_text(dump_yaml(config))
    return config


def plan_trials(config: Config, sweep_dir: Path, rates: list[float]) -> None:
    """Trials with these learning rates, as a driver that died at once leaves them."""
    assert config.search is not None
    study = open_study(config.name, sweep_dir, config.search, False)
    for rate in rates:
        study.enqueue_trial({"train.lr": rate})
        study.ask(distributions(config.search.space))


@pytest.fixture
def most_workers() -> Iterator[list[int]]:
    """The most workers that were reserved, and that were alive, at any time of the test."""
    most, done = [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            groups = placement_group_table().values()
            held = [each for each in groups if each["state"] not in ("REMOVED", "PENDING")]
            bundles = [b for each in held for b in each["bundles"].values() if b.get("CPU")]
            most[:] = [max(most[0], len(bundles)), max(most[1], len(workers()))]

    thread = threading.Thread(target=watch)
    thread.start()
    yield most
    done.set()
    thread.join()


@pytest.mark.slow
def test_trials_that_end_badly_leave_nothing_and_the_sweep_goes_on(
    inputs: Inputs, tmp_path: Path, most_workers: list[int]
) -> None:
    sweep_dir = tmp_path / "sweep"
    search = {**SEARCH, "trials": 4, "max_concurrent": 2}
    config = begin(inputs, sweep_dir, parallel__workers=2, search=search)
    plan_trials(config, sweep_dir, [GOOD / 2, GOOD, EXPLODING, BAD])
    lines: list[str] = []
    killed: list[int] = []

    def kill_the_first_driver(line: str) -> None:
        lines.append(line)
        if line.startswith("trial-000: eval_loss") and not killed:
            killed.extend(process.pid for process in processes("SweepTrial"))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    result = run_sweep(config, sweep_dir, inputs.data_dir, kill_the_first_driver, resume=True)
    assert_nothing_left()
    assert most_workers == [2, 2]  # a stopped trial's are gone before the next one starts
    assert len(killed) == 1

    rows = {row.id: row for row in result.trials}
    assert [row.status for row in result.trials] == ["failed", "completed", "failed", "pruned"]
    assert "the trial's process failed" in (rows["trial-000"].error or "")
    assert "Diverged" in (rows["trial-002"].error or "")
    assert rows["trial-003"].examples < 277
    assert result.best is not None
    assert result.best["trial"] == "trial-001"
    assert result.best["eval_loss"] == rows["trial-001"].eval_loss
    written = json.loads((sweep_dir / "result.json").read_text())
    assert written["status"] == "completed"
    assert written["base"]["eval_loss"] > written["best"]["eval_loss"]
    for row in written["trials"]:
        own = sweep_dir / "trials" / row["id"]
        assert load_config(own / "config.yaml").train.lr == row["params"]["train.lr"]
        left = json.loads((own / "result.json").read_text())
        assert (left["status"], left["error"]) == (row["status"], row["error"])
    assert any(line.startswith("trial-002 failed: Diverged") for line in lines)
    assert "search.max_concurrent=2 is lowered to 1: no more trials fit at a time" in lines


def test_workers_train_one_trial_after_the_other_until_one_is_lost(
    inputs: Inputs, tmp_path: Path
) -> None:
    sweep_dir = tmp_path / "sweep"
    search = {**SEARCH, "trials": 4, "max_concurrent": 1}
    config = begin(inputs, sweep_dir, search=search)
    plan_trials(config, sweep_dir, [GOOD / 4, BAD, GOOD / 2, GOOD])
    seen: list[int] = []
    killed: list[int] = []

    def look(line: str) -> None:
        found = workers()
        seen.extend(process.pid for process in found if process.pid not in seen)
        if line.startswith("trial-002: eval_loss") and not killed:
            killed.extend(process.pid for process in found)
            os.kill(killed[0], signal.SIGKILL)

    result = run_sweep(config, sweep_dir, inputs.data_dir, look, resume=True)
    assert_nothing_left()
    pruned, lost, after = (sweep_dir / "trials" / f"trial-00{number}" for number in (1, 2, 3))
    assert [row.status for row in result.trials] == ["completed", "pruned", *["completed"] * 2]
    assert json.loads((pruned / "result.json").read_text())["status"] == "pruned"
    assert killed == seen[:1]  # it had trained the first two as well
    assert len(seen) == 3  # another one for the rest of the trial, and a third for the next
    for trial in (lost, after):
        alone = tmp_path / trial.name
        run(load_config(trial / "config.yaml"), alone)
        assert largest_difference(alone, trial) == (0.0, 0.0, 0.0)


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_without_losing_or_repeating_a_trial(
    inputs: Inputs, tmp_path: Path
) -> None:
    sweep_dir = tmp_path / "sweep"
    config = begin(inputs, sweep_dir)
    assert config.search is not None
    shorter = config.search.model_copy(update={"scheduler": None})
    config = config.model_copy(update={"search": shorter})
    plan_trials(config, sweep_dir, [GOOD, GOOD / 3])
    ended = threading.Event()

    def interrupt(line: str) -> None:
        if "completed" in line and not ended.is_set():
            ended.set()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="--resume"):
        run_sweep(config, sweep_dir, inputs.data_dir, interrupt, resume=True)
    assert_nothing_left()
    first = json.loads((sweep_dir / "result.json").read_text())
    assert first["status"] == "interrupted"
    kept = [row for row in first["trials"] if row["status"] == "completed"]
    assert 1 <= len(kept) < 3
    files = {
        row["id"]: (sweep_dir / "trials" / row["id"] / "result.json").stat().st_mtime_ns
        for row in kept
    }
    begun: list[str] = []
    result = run_sweep(config, sweep_dir, inputs.data_dir, begun.append, resume=True)
    assert_nothing_left()
    assert result.status == "completed"
    assert [row.id for row in result.trials] == [f"trial-{n:03d}" for n in range(3)]
    again = {row.id: row for row in result.trials}
    for row in first["trials"]:
        assert again[row["id"]].params == row["params"]
    for name, changed_ns in files.items():
        assert (sweep_dir / "trials" / name / "result.json").stat().st_mtime_ns == changed_ns
        assert not any(line.startswith(f"{name} started") for line in begun)
    assert result.makespan_s > first["makespan_s"]

    # The trial that was not planned is what the seed draws, resumed or not.
    study = open_study(config.name, sweep_dir, shorter, True)
    replay = optuna.create_study()
    replay.add_trials(study.trials[:2])
    replay.sampler = JointSampler(shorter, config.seed)
    drawn = replay.ask(distributions(shorter.space)).params
    assert drawn == study.trials[2].params


def test_a_trial_that_does_not_fit_is_refused_before_anything_is_written(
    inputs: Inputs, tmp_path: Path
) -> None:
    sweep_dir = tmp_path / "sweep"
    config = begin(inputs, sweep_dir, parallel__resources_per_worker={"CPU": 1.0, "GPU": 1.0})
    with pytest.raises(ClusterError, match="needs 1 GPU; the cluster has 0 GPU"):
        run_sweep(config, sweep_dir, inputs.data_dir, print)
    assert [path.name for path in sweep_dir.iterdir()] == ["config.yaml"]


@pytest.mark.slow
def test_classifiers_are_searched_by_accuracy_and_the_best_is_promoted(tmp_path: Path) -> None:
    encoder = save_tiny_encoder(tmp_path / "encoder")
    rows = [{"text": f"{'ab'[i % 2] * 3} {'xyz'[i % 3]}", "label": "ab"[i % 2]} for i in range(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    search = {**SEARCH, "trials": 2, "scheduler": None, "metric": "eval_accuracy", "mode": "max"}
    changes = {"data.train.format": "classification", "train.objective": "classification"}
    plain = {**changes, "train.max_examples": 140, "train.eval_every_examples": 70}
    config = make_config(encoder, file, {**plain, "search": search, "promote.max_overlap": 1.0})
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config.data, tokenizer, config.seed, tmp_path / ".cache")
    sweep_dir = tmp_path / "sweep"
    sweep_dir.mkdir()
    (sweep_dir / "config.yaml").write_text(dump_yaml(config))
    plan_trials(config, sweep_dir, [BAD, GOOD])
    result = run_sweep(config, sweep_dir, data.path, lambda _: None, resume=True)
    assert_nothing_left()
    bad, good = result.trials
    assert (bad.value or 0) < (good.value or 0) == 1.0
    assert result.best is not None
    assert result.best["trial"] == "trial-001"
    promotion = promote(sweep_dir, cache_dir=tmp_path / ".cache")
    assert (promotion.trial, promotion.better) == ("trial-001", True)
    assert promotion.evaluation.metric == "accuracy"
    assert promotion.evaluation.promoted["accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(promotion.model)
    assert model.config.id2label == {0: "a", 1: "b"}
    assert_nothing_left()
