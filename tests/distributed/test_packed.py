"""An engine of two ranks trains its runs as one process does, and its ranks never part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raytune_ft.checkpoints.store import CheckpointStore
from raytune_ft.config.schema import Config
from raytune_ft.packed import autotune as packed_fit
from tests.support.distributed import run_distributed
from tests.support.models import save_tiny, true_float64
from tests.support.packed import RUNS, Packed, assert_untouched, beside_a_sick_run, run_packed
from tests.support.rolled import BY_OBJECTIVE, configs_of, said, save_rolled_inputs
from tests.support.runs import (
    largest_difference,
    make_config,
    metrics,
    write_rows,
)

pytestmark = pytest.mark.distributed
BOUNDS = {"float64": 1e-9, "float32": 1e-5}
BUDGETS = {"short": 28, "long": 99, "wide": 16 * 3, "late": 36}  # a last step of 1 example
RANKS = 2

Inputs = tuple[Path, Path]


def _configs(inputs: Inputs, shared: dict[str, Any]) -> dict[str, Config]:
    data = {"data.validation": {"path": str(inputs[1])}}
    return {
        name: make_config(*inputs, {**data, **own, "train.max_examples": BUDGETS[name], **shared})
        for name, own in RUNS.items()
    }


def _train(inputs: Inputs, root: Path, precision: str, strategy: str, **shared: Any) -> None:
    """The last run enters a slot that another one has used."""
    changes = {key.replace("__", "."): value for key, value in shared.items()}
    with true_float64() if precision == "float64" else nullcontext():
        configs = _configs(inputs, {"train.precision": precision, **changes})
        assert set(run_packed(configs, root, 3, strategy=strategy)) == set(RUNS)


CASES = {  # directory: precision and what else is different
    "float64": ("float64", {"data__packing": False}),
    "float32": ("float32", {}),
    "selective": (
        "float32",
        {"parallel__activation_checkpointing": "selective", "train__micro_tokens": 100},
    ),
    "full": ("float32", {"parallel__activation_checkpointing": "full"}),
}


def _train_on_ranks(inputs: Inputs, root: Path, strategy: str, cases: Sequence[str]) -> None:
    for case in cases:
        precision, shared = CASES[case]
        _train(inputs, root / case, precision, strategy, **shared)


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Path:
    root = tmp_path_factory.mktemp("one")
    for precision in BOUNDS:
        _train(inputs, root / precision, precision, "single")
    return root


@pytest.mark.parametrize(
    ("strategy", "cases"),
    [
        ("ddp", ["float64", "float32"]),
        ("fsdp", ["float64", "float32"]),
        pytest.param("fsdp", ["selective", "full"], marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp", "fsdp that recomputes"],
)
def test_two_ranks_as_one_process(
    tmp_path: Path, inputs: Inputs, of_one_process: Path, strategy: str, cases: Sequence[str]
) -> None:
    run_distributed(_train_on_ranks, RANKS, inputs, tmp_path, strategy, cases)
    for case in cases:
        precision, _ = CASES[case]
        for name in RUNS:
            one = of_one_process / precision / name
            differences = largest_difference(tmp_path / case / name, one)
            assert max(differences) < BOUNDS[precision], (case, name, differences)


def _shard(inputs: Inputs, root: Path) -> None:
    packed = Packed(make_config(*inputs), root, 1, strategy="fsdp")
    packed.enter("a", make_config(*inputs))
    parts = [p.to_local().numel() for p in packed.engine.passes.stack.model.parameters()]  # type: ignore[attr-defined]
    whole = [p.numel() for p in packed.engine.passes.stack.model.parameters()]
    assert sum(parts) < 0.6 * sum(whole)
    packed.passes(2)
    assert [p.to_local().numel() for p in packed.engine.passes.stack.model.parameters()] == parts  # type: ignore[attr-defined]
    packed.engine.leave(root / "a", "pruned")
    packed.engine.close()


def test_the_base_is_sharded(tmp_path: Path, inputs: Inputs) -> None:
    run_distributed(_shard, RANKS, inputs, tmp_path)


def _settle(inputs: Inputs, root: Path) -> None:
    packed = Packed(make_config(*inputs), root, 6, strategy="fsdp")
    passes, rank = packed.engine.passes, packed.engine.passes.runner.strategy.rank
    passes.settle(None, measured=False)  # the adapted layers are there, and the size of a slot
    base = sum(4 * p.to_local().numel() for p in passes.stack.model.parameters())  # type: ignore[attr-defined]
    of_slot = 4 * passes.stack.numbers * packed_fit.COPIES["cpu"]
    memory = base + int((2 + rank) * of_slot / packed_fit.SHARE)
    assert packed_fit.slots_in(memory, passes.stack, torch.float32, torch.device("cpu")) == 2 + rank
    assert passes.settle(memory, measured=True).startswith(("1 slot", "2 slots"))
    assert passes.slots == passes.runner.strategy.from_rank0(passes.slots)
    packed.engine.close()


def test_the_rank_with_the_least_memory_bounds_slots(tmp_path: Path, inputs: Inputs) -> None:
    run_distributed(_settle, RANKS, inputs, tmp_path)


def _train_gpt2(inputs: Inputs, root: Path, strategy: str) -> None:
    for precision in ("float32", "bfloat16"):
        changes = {"train.precision": precision, "train.max_examples": 70}
        configs = {
            str(rank): make_config(*inputs, changes | {"method.rank": rank}) for rank in (2, 5)
        }
        run_packed(configs, root / precision, strategy=strategy)


def test_transposed_layers_with_biases_and_mixed_precision(tmp_path: Path) -> None:
    inputs = save_tiny("gpt2", tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 60)
    run_distributed(_train_gpt2, RANKS, inputs, tmp_path / "two", "fsdp")
    _train_gpt2(inputs, tmp_path / "one", "single")
    for precision, bound in (("float32", 1e-5), ("bfloat16", 0.05)):
        for rank in ("2", "5"):
            two, one = tmp_path / "two" / precision / rank, tmp_path / "one" / precision / rank
            assert max(largest_difference(two, one)[:2]) < bound


@pytest.mark.parametrize(("strategy", "sickness"), [("ddp", "nan"), ("fsdp", "lr")])
def test_a_sick_slot_leaves_the_others_untouched_to_the_bit(
    tmp_path: Path, inputs: Inputs, strategy: str, sickness: str
) -> None:
    """Also where one rank alone finds the numbers sick."""
    run_distributed(beside_a_sick_run, RANKS, inputs, tmp_path, sickness, strategy)
    assert_untouched(tmp_path)


def _with_a_disk_that_fails_once(inputs: Inputs, root: Path) -> None:
    """For one of two runs, and on the rank that writes."""
    finish = CheckpointStore.finish

    def fail(store: CheckpointStore, *arguments: Any) -> None:
        if dist.get_rank() == 0 and store.root.parent.name == "a":
            raise OSError("no space left on device")
        finish(store, *arguments)

    config = make_config(*inputs, {"train.max_examples": 70})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "finish", fail)
        run_packed({"a": config, "b": config}, root, strategy="ddp")


def test_a_checkpoint_that_cannot_be_written_fails_that_run_alone(
    tmp_path: Path, inputs: Inputs
) -> None:
    run_distributed(_with_a_disk_that_fails_once, RANKS, inputs, tmp_path)
    assert "no space left" in json.loads((tmp_path / "a" / "result.json").read_text())["error"]
    assert json.loads((tmp_path / "b" / "result.json").read_text())["status"] == "completed"


RESUMED = {"train.precision": "float64", "train.max_examples": 140}


def _interrupted(inputs: Inputs, root: Path, strategy: str) -> None:
    """In the middle, beside another run."""
    config = make_config(*inputs, RESUMED)
    with true_float64():
        packed = Packed(config, root, 2, strategy=strategy)
        for name in ("neighbour", "run"):
            packed.enter(name, config)
        packed.passes(9)
        for name in ("neighbour", "run"):
            packed.engine.leave(root / name, "interrupted")
        packed.engine.close()


def _go_on(inputs: Inputs, root: Path, strategy: str) -> None:
    with true_float64():
        run_packed({"run": make_config(*inputs, RESUMED)}, root, strategy=strategy)


def _there_and_back(inputs: Inputs, root: Path) -> None:
    _interrupted(inputs, root / "to-one", "fsdp")
    _go_on(inputs, root / "to-two", "fsdp")


def test_resumed_on_another_number_of_ranks(tmp_path: Path, inputs: Inputs) -> None:
    _interrupted(inputs, tmp_path / "to-two", "single")
    run_distributed(_there_and_back, RANKS, inputs, tmp_path)
    _go_on(inputs, tmp_path / "to-one", "single")
    _go_on(inputs, tmp_path / "whole", "single")
    for name in ("to-one", "to-two"):
        steps = [line["step"] for line in metrics(tmp_path / name / "run") if "loss" in line]
        assert steps == list(range(1, 21))
        differences = largest_difference(tmp_path / name / "run", tmp_path / "whole" / "run")
        assert max(differences) < BOUNDS["float64"], (name, differences)


def _roll_out(inputs: Path, root: Path, strategy: str) -> None:
    with true_float64():
        for objective in BY_OBJECTIVE:
            configs = configs_of(inputs, objective, **{"train.micro_tokens": 96})
            run_packed(configs, root / objective, slots=3, strategy=strategy)


@pytest.fixture(scope="module")
def rolled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Inputs, and runs on them in one process."""
    inputs = save_rolled_inputs(tmp_path_factory.mktemp("rolled") / "inputs")
    _roll_out(inputs, inputs.parent / "one", "single")
    return inputs, inputs.parent / "one"


@pytest.mark.slow  # rollouts on ranks: test_objectives.py; packed: unit/packed/test_rollouts.py
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_rollouts_on_two_ranks(tmp_path: Path, rolled: tuple[Path, Path], strategy: str) -> None:
    inputs, one = rolled
    run_distributed(_roll_out, RANKS, inputs, tmp_path, strategy)
    for objective, runs in BY_OBJECTIVE.items():
        for name in runs:
            ours, theirs = (root / objective / name for root in (tmp_path, one))
            assert said(ours) == said(theirs)
            differences = largest_difference(ours, theirs)
            assert max(differences) < BOUNDS["float64"], (objective, name, differences)
