"""Which trial is promoted, from the files that a sweep leaves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.checkpoints.store import CheckpointFacts, CheckpointStore
from raytune_ft.config.load import dump_yaml, load_config
from raytune_ft.errors import CheckpointError, RunFailed, StorageError
from raytune_ft.promote.select import select
from tests.support.checkpoints import commit

CONFIG = """
name: sweep
data: {train: {path: train.jsonl}}
search:
  metric: METRIC
  mode: MODE
  space: {train.lr: {log_uniform: [1e-5, 1e-3]}}
promote: {top_k: 2}
"""


@pytest.fixture
def said() -> list[str]:
    return []


def metrics(loss: float) -> dict[str, float]:
    return {"eval_loss": loss, "eval_token_accuracy": 1 - loss, "eval_exact_match": 0.0}


def make_run(
    run: Path, losses: list[float], result: bool = True, metric: str = "eval_loss"
) -> None:
    """Checkpoints of steps 1, 2, ... with these losses, and what points to the best of them."""

    def write(folder: Path) -> None:
        (folder / "weights").write_text("w")

    store = CheckpointStore(run / "checkpoints")
    for step, loss in enumerate(losses, start=1):
        commit(
            store,
            step,
            write,
            CheckpointFacts(step * 8, "c", "lora", loss, metrics(loss)),
        )
    best = losses.index(min(losses)) + 1
    point = {"step": best, "examples": best * 8, "checkpoint": f"checkpoints/step-{best:06d}"}
    content = {"status": "completed", "best": point | metrics(min(losses)), "error": None}
    if result:
        (run / "result.json").write_text(json.dumps(content))


def make_sweep(
    directory: Path,
    trials: dict[str, tuple[str, list[float]]],
    metric: str = "eval_loss",
    mode: str = "min",
    best: str | None = None,
) -> Path:
    directory.mkdir()
    (directory / "config.yaml").write_text(CONFIG.replace("METRIC", metric).replace("MODE", mode))
    config = dump_yaml(load_config(directory / "config.yaml"))
    records: list[dict[str, Any]] = []
    for name, (status, losses) in trials.items():
        run = directory / "trials" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(config)
        if losses:
            make_run(run, losses, result=status != "pruned")
        records.append({"id": name, "params": {"train.lr": len(name)}, "status": status})
    result = {"status": "completed", "best": {"trial": best}, "trials": records}
    (directory / "result.json").write_text(json.dumps(result))
    return directory


def test_the_best_usable_trial_is_taken(tmp_path: Path, said: list[str]) -> None:
    sweep = make_sweep(
        tmp_path / "sweep",
        {
            "t1": ("completed", [0.9, 0.4, 0.5]),
            "t2": ("failed", [0.1]),
            "t3": ("early_stopped", [0.3, 0.35]),
            "t4": ("interrupted", [0.05]),
            "t5": ("pruned", [0.7, 0.6]),
            "t6": ("failed", []),
        },
    )
    chosen = select(sweep, said.append)
    assert chosen.candidate.trial == "t3"
    assert chosen.candidate.checkpoint == sweep / "trials/t3/checkpoints/step-000001"
    assert (chosen.candidate.score, chosen.manifest.examples) == (0.3, 8)
    assert chosen.candidate.params == {"train.lr": 2}
    assert said == []


def test_a_stopped_trial_without_a_result_is_read_from_its_manifests(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep", {"t1": ("pruned", [0.7, 0.2, 0.6])})
    chosen = select(sweep, print)
    assert chosen.candidate.checkpoint.name == "step-000002"


def test_more_is_better_under_mode_max(tmp_path: Path) -> None:
    trials = {"t1": ("completed", [0.9]), "t2": ("pruned", [0.6, 0.2]), "t3": ("completed", [0.4])}
    sweep = make_sweep(tmp_path / "sweep", trials, "eval_token_accuracy", "max")
    chosen = select(sweep, print)
    assert chosen.candidate.trial == "t2"
    assert chosen.candidate.checkpoint.name == "step-000002"
    assert (chosen.metric, chosen.mode) == ("eval_token_accuracy", "max")


def test_the_sweep_has_the_last_word_on_ties(tmp_path: Path) -> None:
    trials = {"t1": ("completed", [0.4]), "t2": ("completed", [0.4])}
    sweep = make_sweep(tmp_path / "sweep", trials, best="t2")
    assert select(sweep, print).candidate.trial == "t2"


def test_a_damaged_best_is_passed_over_and_top_k_is_the_limit(
    tmp_path: Path, said: list[str]
) -> None:
    trials = {name: ("completed", [0.1 * int(name[1])]) for name in ("t1", "t2", "t3")}
    sweep = make_sweep(tmp_path / "sweep", trials)
    (sweep / "trials/t1/checkpoints/step-000001/weights").write_text("x")
    assert select(sweep, said.append).candidate.trial == "t2"
    assert len(said) == 1
    assert "t1 is passed over" in said[0]
    (sweep / "trials/t2/checkpoints/step-000001/weights").unlink()
    with pytest.raises(CheckpointError, match="no sound checkpoint to promote among its best 2"):
        select(sweep, said.append)


def test_random_sweeps(tmp_path: Path) -> None:
    draw = random.Random(0)
    statuses = ["completed", "early_stopped", "pruned", "failed", "interrupted"]
    for case in range(10):
        trials = {
            f"t{i}": (draw.choice(statuses), [draw.random() for _ in range(draw.randint(1, 3))])
            for i in range(5)
        }
        usable = [min(losses) for status, losses in trials.values() if status in statuses[:3]]
        sweep = make_sweep(tmp_path / str(case), trials)
        if usable:
            assert select(sweep, print).candidate.score == min(usable)
        else:
            with pytest.raises(RunFailed, match="no usable trial among its 5"):
                select(sweep, print)


def test_a_run_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        CONFIG.replace("METRIC", "eval_exact_match").replace("MODE", "max")
    )
    make_run(tmp_path, [0.5, 0.2, 0.3])
    chosen = select(tmp_path, print)
    assert (chosen.candidate.trial, chosen.candidate.checkpoint.name) == (None, "step-000002")
    assert chosen.metric == "eval_loss"  # `train` ignores the search section


def test_a_run_that_failed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        CONFIG.replace("METRIC", "eval_loss").replace("MODE", "min")
    )
    make_run(tmp_path, [0.5])
    set_status(tmp_path, "failed")
    with pytest.raises(RunFailed, match="has status failed"):
        select(tmp_path, print)
    set_status(tmp_path, "interrupted")
    with pytest.raises(StorageError, match="was interrupted; continue it with --resume first"):
        select(tmp_path, print)


def test_a_sweep_that_was_interrupted_is_refused(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep", {"t1": ("completed", [0.9])})
    set_status(sweep, "interrupted")
    with pytest.raises(StorageError, match="was interrupted; continue it with --resume first"):
        select(sweep, print)


def set_status(directory: Path, status: str) -> None:
    content = json.loads((directory / "result.json").read_text()) | {"status": status}
    (directory / "result.json").write_text(json.dumps(content))


def test_what_is_no_ended_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"holds no result\.json"):
        select(tmp_path, print)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(StorageError, match="cannot be read"):
        select(tmp_path, print)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(StorageError, match=r"holds no config\.yaml"):
        select(tmp_path, print)


def test_a_result_names_no_run_elsewhere(tmp_path: Path) -> None:
    make_sweep(tmp_path / "private", {"t1": ("completed", [0.1])})
    sweep = make_sweep(tmp_path / "sweep", {"t1": ("completed", [0.9])})
    result = json.loads((sweep / "result.json").read_text())
    result["trials"][0]["id"] = "../../private/trials/t1"
    (sweep / "result.json").write_text(json.dumps(result))
    with pytest.raises(StorageError, match="is not in trials; find out who wrote that file"):
        select(sweep, print)
