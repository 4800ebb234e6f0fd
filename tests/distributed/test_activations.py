"""Methods that work on activations: the same numbers in every layout, also after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.activations import METHODS
from tests.support.distributed import run_distributed
from tests.support.models import save_tiny_llama, true_float64
from tests.support.runs import final_weights, largest_difference, make_config, run, write_rows

pytestmark = pytest.mark.distributed
ALONE = {"data.packing": False, "train.micro_tokens": 1}
TOGETHER = {"data.packing": "auto", "train.micro_tokens": 96}


def _train(root: Path, name: str, layout: str, strategy: str, changes: dict[str, Any]) -> None:
    settings = {
        "method": METHODS[name],
        "train.precision": "float64",
        "train.adam_epsilon": 1e-6,
        "train.max_examples": 7 * 5 - 3,
        "train.lr_schedule": "constant",
        "train.warmup_fraction": 0.0,
        "checkpoint.every_examples": 14,
    }
    config = make_config(root / "model", root / "rows.jsonl", settings | changes)
    with true_float64():
        result = run(config, root / f"{name}-{layout}", strategy)
    assert result.status == "completed", result.error


def _train_all(root: Path, layout: str, strategy: str, changes: dict[str, Any]) -> None:
    for name in METHODS:
        _train(root, name, layout, strategy, changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method trained one example at a time."""
    folder = tmp_path_factory.mktemp("activations")
    save_tiny_llama(folder / "model")
    write_rows(folder / "rows.jsonl", 40)
    _train_all(folder, "alone", "single", ALONE)
    return folder


@pytest.mark.slow
def test_packed_rows_in_one_process_and_a_resume(root: Path) -> None:
    half = TOGETHER | {"train.max_examples": 14, "parallel.activation_checkpointing": "full"}
    _train_all(root, "packed", "single", half)
    for name in METHODS:
        (root / f"{name}-packed" / "result.json").unlink()
    _train_all(root, "packed", "single", half | {"train.max_examples": 32})
    for name in METHODS:
        first, second = (final_weights(root / f"{name}-{each}") for each in ("alone", "packed"))
        assert all((first[k] - second[k]).abs().max() < 1e-9 for k in first), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes(root: Path, strategy: str) -> None:
    run_distributed(_train_all, 2, root, strategy, strategy, TOGETHER)
    for name in METHODS:
        found = largest_difference(root / f"{name}-{strategy}", root / f"{name}-alone")
        assert max(found) < 1e-9, (name, found)
