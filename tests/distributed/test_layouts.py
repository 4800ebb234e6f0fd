"""Layout never changes the math: every strategy, packing and micro-batching against one process.

A tiny Llama with a batch that no number of workers divides, several epochs and a last step that
takes what remains. `make test` takes 10 steps in float64, where the bound is tightest.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.model.objectives import tokens
from raytune_ft.strategy.ddp import Ddp
from raytune_ft.train.optim import build_optimizer
from tests.support.distributed import run_distributed, run_in_new_processes
from tests.support.models import FAMILIES, VOCABULARY, true_float64
from tests.support.runs import largest_difference, make_config, run

METHODS = {"lora": {}, "full": {"method": {"name": "full"}}, "dora": {"method.dora": True}}
BOUNDS = {"float64": 1e-9, "float32": 1e-5}  # of losses, evaluations and weights
EXACT = [("lora", "float64"), ("full", "float64"), ("dora", "float64")]
CASES = [*EXACT, ("lora", "float32"), ("full", "float32")]
BFLOAT16 = [("lora", "bfloat16"), ("full", "bfloat16")]
SINGLE_LAYOUTS: list[dict[str, Any]] = [
    {"data.packing": True, "train.micro_tokens": 48},
    {"data.packing": True, "train.micro_tokens": 200},
    {"data.packing": False, "train.micro_tokens": 100},
    {"data.packing": "auto"},
]
OF_SPREAD = SINGLE_LAYOUTS[1:]
STEPS: dict[int, dict[str, Any]] = {
    10: {
        "train.max_examples": 67,
        "train.eval_every_examples": 28,
        "checkpoint.every_examples": 20,
    },
    40: {},
}

GROUPS = [
    ("ddp", 2, EXACT, 10),
    ("fsdp", 2, EXACT, 10),
    pytest.param("ddp", 2, CASES + BFLOAT16, 40, marks=pytest.mark.slow),
    pytest.param("ddp", 3, CASES, 40, marks=pytest.mark.slow),
    pytest.param("fsdp", 2, CASES + BFLOAT16, 40, marks=pytest.mark.slow),
]


class References:
    """One example after another in one process: no packing, no padding, one row at a time. Each of
    these runs is made once.
    """

    def __init__(self, inputs: tuple[Path, Path], root: Path) -> None:
        self._inputs, self._root = inputs, root

    def of(self, method: str, precision: str, steps: int) -> Path:
        run_dir = self._root / f"{method}-{precision}-{steps}"
        if not run_dir.exists():
            layout = {"data.packing": False, "train.micro_tokens": 1}
            _run(self._inputs, run_dir, method, precision, layout, "single", steps)
        return run_dir


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, inputs: tuple[Path, Path]) -> References:
    return References(inputs, tmp_path_factory.mktemp("references"))


def _run(
    inputs: tuple[Path, Path],
    run_dir: Path,
    method: str,
    precision: str,
    layout: dict[str, Any],
    strategy: str,
    steps: int,
) -> None:
    changes = {"train.precision": precision, **STEPS[steps], **METHODS[method], **layout}
    with true_float64() if precision == "float64" else nullcontext():
        result = run(make_config(*inputs, changes), run_dir, strategy)
    assert result.status == "completed"


def _run_all(
    inputs: tuple[Path, Path], root: Path, strategy: str, cases: list[tuple[str, str]], steps: int
) -> None:
    for method, precision in cases:
        layout = {"data.packing": strategy == "fsdp", "train.micro_tokens": 96}
        run_dir = root / f"{method}-{precision}"
        _run(inputs, run_dir, method, precision, layout, strategy, steps)


def _spread(inputs: tuple[Path, Path], root: Path, reference: Path, method: str) -> float:
    """How far losses in bfloat16 move within one process, only for being laid out otherwise."""
    moved = []
    for number, layout in enumerate(OF_SPREAD):
        run_dir = root / f"{method}-{number}"
        _run(inputs, run_dir, method, "bfloat16", layout, "single", 40)
        moved.append(max(largest_difference(run_dir, reference)[:2]))
    assert 0 < max(moved) < 0.05, moved
    return max(moved)


@pytest.mark.parametrize("layout", SINGLE_LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("method", "precision", "steps"),
    [
        *((*case, 10) for case in EXACT),
        *(pytest.param(*case, 40, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_one_process(
    tmp_path: Path,
    inputs: tuple[Path, Path],
    references: References,
    method: str,
    precision: str,
    steps: int,
    layout: dict[str, Any],
) -> None:
    _run(inputs, tmp_path / "run", method, precision, layout, "single", steps)
    differences = largest_difference(tmp_path / "run", references.of(method, precision, steps))
    assert max(differences) < BOUNDS[precision], differences


@pytest.mark.distributed
@pytest.mark.parametrize(("strategy", "world_size", "cases", "steps"), GROUPS)
def test_several_processes(
    tmp_path: Path,
    inputs: tuple[Path, Path],
    references: References,
    strategy: str,
    world_size: int,
    cases: list[tuple[str, str]],
    steps: int,
) -> None:
    run_distributed(_run_all, world_size, inputs, tmp_path, strategy, cases, steps)
    for method, precision in cases:
        reference = references.of(method, precision, steps)
        differences = largest_difference(tmp_path / f"{method}-{precision}", reference)
        if precision == "bfloat16":
            spread = _spread(inputs, tmp_path / "spread", reference, method)
            assert max(differences[:2]) < 2 * spread, (method, differences)
        else:
            assert max(differences) < BOUNDS[precision], (method, precision, differences)


def _gradients_stay_in_buckets() -> None:
    strategy = Ddp(ParallelConfig(strategy="ddp", workers=2), "float32")
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    wrapped = strategy.prepare(model, lambda found: build_optimizer(found, TrainConfig()))
    tokens = torch.arange(8).unsqueeze(0)
    places, held = [], {}
    for _ in range(3):
        for last in (False, True):
            with strategy.accumulate(last):
                strategy.backward(wrapped(input_ids=tokens).logits.square().mean())
            places.append([parameter.grad.data_ptr() for parameter in model.parameters()])
            storages = [parameter.grad.untyped_storage() for parameter in model.parameters()]
            held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        strategy.step(1e-3, 1.0)
    assert places[2] == places[3] == places[4] == places[5]  # torch arranges buckets once, by use
    assert sum(held.values()) == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.distributed
def test_ddp_has_one_copy_of_gradients() -> None:
    run_distributed(_gradients_stay_in_buckets, 2)


def _run_in_blocks(inputs: tuple[Path, Path], root: Path, strategy: str) -> None:
    """As `_run_all`, with the logits of five label tokens at a time."""
    with mock.patch.object(tokens, "BLOCK_LOGITS", 5 * VOCABULARY):
        for method in ("lora", "full"):
            layout = {"data.packing": True, "train.micro_tokens": 96}
            _run(inputs, root / method, method, "float32", layout, strategy, 10)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("ddp", marks=pytest.mark.slow),
        "fsdp",
        pytest.param("deepspeed", marks=pytest.mark.slow),
    ],
)
def test_logits_in_blocks(
    tmp_path: Path, inputs: tuple[Path, Path], references: References, strategy: str
) -> None:
    start = run_in_new_processes if strategy == "deepspeed" else run_distributed
    start(_run_in_blocks, 2, inputs, tmp_path / strategy, strategy)
    for method in ("lora", "full"):
        reference = references.of(method, "float32", 10)
        differences = largest_difference(tmp_path / strategy / method, reference)
        assert max(differences) < 1e-5, differences
