"""A mix of three sources under a curriculum is the same run in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Config
from tests.support.distributed import run_distributed, run_in_new_processes
from tests.support.models import true_float64
from tests.support.packed import run_packed
from tests.support.runs import (
    BrokenRun,
    Recorder,
    largest_difference,
    make_config,
    make_inputs,
    metrics,
    run,
    write_rows,
)

pytestmark = pytest.mark.distributed
BOUND = 1e-9
STEPS, BROKEN = 12, 5
CURRICULA: dict[str, dict[str, Any]] = {
    "paced": {"schedule": "sqrt", "start": 0.1, "until": 0.6},
    "sorted": {"schedule": "sort", "order": "hard_first"},
}
OWN: dict[str, dict[str, Any]] = {
    "paced": {"train.batch_size": 7},
    "sorted": {"train.batch_size": 5, "seed": 3, "method.rank": 2},
}
Inputs = tuple[Path, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    model, rows = make_inputs(tmp_path_factory.mktemp("inputs"))
    for seed, (name, count) in enumerate({"few": 12, "some": 30}.items(), start=1):
        write_rows(rows.with_name(f"{name}.jsonl"), count, seed)
    return model, rows


def _config(inputs: Inputs, name: str, other: dict[str, Any] | None = None) -> Config:
    model, rows = inputs
    weights = {"rows": 0.5, "few": 0.3, "some": 0.2}
    files = {source: str(rows.with_name(f"{source}.jsonl")) for source in weights}
    own = OWN[name]
    changes = {
        "train.precision": "float64",
        "train.max_examples": own["train.batch_size"] * STEPS - 2,
        "train.eval_every_examples": 40,
        "checkpoint.every_examples": own["train.batch_size"] * 3,
        "checkpoint.asynchronous": False,
        "data.train": [{"path": path, "weight": weights[source]} for source, path in files.items()],
        # Not drawn, so that runs of several seeds have the same data.
        "data.validation": [{"path": path} for path in files.values()],
        "data.curriculum": CURRICULA[name],
    }
    return make_config(model, rows, changes | own | (other or {}))


def _train(inputs: Inputs, root: Path, name: str, strategy: str, resumes: bool = False) -> None:
    with true_float64():
        result = run(_config(inputs, name), root / name, strategy, resumes=resumes)
    assert result.status == "completed"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Path:
    root = tmp_path_factory.mktemp("whole")
    for name in CURRICULA:
        _train(inputs, root, name, "single")
    return root


def _assert_same(run_dir: Path, expected: Path, bound: float = BOUND) -> None:
    assert max(largest_difference(run_dir, expected)) < bound
    found, wanted = (
        [line["eval_loss_by_source"] for line in metrics(each) if "eval_loss" in line]
        for each in (run_dir, expected)
    )
    assert len(found) == len(wanted) > 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert list(ours) == list(theirs) == ["rows", "few", "some"]
        assert all(abs(ours[name] - theirs[name]) < bound for name in ours)


def _everywhere(inputs: Inputs, root: Path) -> None:
    _train(inputs, root / "whole", "paced", "ddp")
    _train(inputs, root / "sharded", "paced", "fsdp")
    _train(inputs, root / "broken", "paced", "ddp", resumes=True)


def test_two_ranks_and_a_resume_under_them(tmp_path: Path, inputs: Inputs, whole: Path) -> None:
    """The run breaks in one process, while its curriculum has not opened all examples."""
    with true_float64(), pytest.raises(BrokenRun):
        run(_config(inputs, "paced"), tmp_path / "broken" / "paced", reporter=Recorder(BROKEN))
    run_distributed(_everywhere, 2, inputs, tmp_path)
    for each in ("whole", "sharded", "broken"):
        _assert_same(tmp_path / each / "paced", whole / "paced")


def _under_deepspeed(inputs: Inputs, root: Path) -> None:
    changes = {"train.precision": "float32", "parallel.strategy": "deepspeed"}
    run(_config(inputs, "paced", changes), root / "zero-3", "deepspeed")


@pytest.mark.slow
def test_two_ranks_under_deepspeed(tmp_path: Path, inputs: Inputs) -> None:
    """In float32, since DeepSpeed has no float64."""
    run(_config(inputs, "paced", {"train.precision": "float32"}), tmp_path / "whole")
    run_in_new_processes(_under_deepspeed, 2, inputs, tmp_path)
    _assert_same(tmp_path / "zero-3", tmp_path / "whole", 1e-5)


def test_packed_runs_are_those_alone(tmp_path: Path, inputs: Inputs, whole: Path) -> None:
    """Two slots over the same tokens, each with a mix, a curriculum and a seed of its own."""
    configs = {name: _config(inputs, name) for name in CURRICULA}
    with true_float64():
        assert set(run_packed(configs, tmp_path, 2)) == set(configs)
    for name in CURRICULA:
        _assert_same(tmp_path / name, whole / name)


def test_losses_by_source_make_up_the_loss(inputs: Inputs, whole: Path) -> None:
    """The evaluations differ by source, and each is the mean of its own examples."""
    line = next(line for line in metrics(whole / "paced") if "eval_loss" in line)
    own = line["eval_loss_by_source"]
    assert len(set(own.values())) == 3
    assert min(own.values()) < line["eval_loss"] < max(own.values())
