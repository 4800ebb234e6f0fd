"""Memory that runs out in a pass: the run goes on with smaller ones, and learns the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ft.data.batch import MicroBatch
from raytune_ft.errors import PassTooLarge, is_out_of_memory
from raytune_ft.model.checkpointing import Activations, checkpoint_activations
from raytune_ft.train.budget import lowered, lowered_slots, lowers
from raytune_ft.train.model_runner import ModelRunner
from tests.support.runs import Recorder, largest_difference, make_config, run

MICRO_TOKENS = 400


@pytest.fixture
def device_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """A function that limits the tokens of a pass. It returns the sizes of passes that failed."""

    def shrink(tokens: int) -> list[int]:
        right, refused = ModelRunner.inputs, list[int]()

        def inputs(self: ModelRunner, batch: MicroBatch) -> dict[str, Any]:
            if batch.tokens_BS.numel() > tokens:
                refused.append(batch.tokens_BS.numel())
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return right(self, batch)

        monkeypatch.setattr(ModelRunner, "inputs", inputs)
        return refused

    return shrink


def test_a_run_goes_on_with_smaller_passes(
    tmp_path: Path, inputs: tuple[Path, Path], device_of: Callable[[int], list[int]]
) -> None:
    config = make_config(*inputs, {"train.micro_tokens": MICRO_TOKENS})
    run(config, tmp_path / "undisturbed")
    refused = device_of(130)
    heard = Recorder()
    result = run(config, tmp_path / "run", reporter=heard)
    assert refused
    assert result.status == "completed"
    assert max(largest_difference(tmp_path / "run", tmp_path / "undisturbed")) < 1e-5
    assert result.notes[-1] == "train.micro_tokens was lowered to 100: memory ran out with more"
    assert json.loads((tmp_path / "run/budget.json").read_text()) == {"micro_tokens": 100}


def test_a_row_that_is_too_large_ends_the_run(
    tmp_path: Path, inputs: tuple[Path, Path], device_of: Callable[[int], list[int]]
) -> None:
    refused = device_of(40)  # the probe of packing fits, and the longest row does not
    config = make_config(*inputs, {"train.micro_tokens": MICRO_TOKENS})
    result = run(config, tmp_path / "run")
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.startswith("OutOfMemory: CUDA out of memory")
    assert len(refused) > 2


def test_a_row_that_is_too_large_is_computed_twice(
    tmp_path: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the estimate that chose no recomputation was wrong."""
    config = make_config(*inputs, {"train.micro_tokens": 50, "train.max_examples": 70})
    run(config, tmp_path / "undisturbed")
    right, kept = ModelRunner.inputs, list[str]()

    def short(model: nn.Module, policy: Activations) -> None:
        kept.append(policy)
        checkpoint_activations(model, policy)

    def inputs_of(self: ModelRunner, batch: MicroBatch) -> dict[str, Any]:
        if kept[-1] != "full" and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return right(self, batch)

    monkeypatch.setattr("raytune_ft.train.setup.checkpoint_activations", short)
    monkeypatch.setattr(ModelRunner, "inputs", inputs_of)
    result = run(config, tmp_path / "run")
    assert result.status == "completed"
    assert kept[0] == "none"
    assert kept[-1] == "full"
    note = "parallel.activation_checkpointing became full: memory ran out with less"
    assert result.notes[-1] == note
    assert max(largest_difference(tmp_path / "run", tmp_path / "undisturbed")) < 1e-5


def test_after_tokens_slots_are_halved_and_then_blocks_recomputed(tmp_path: Path) -> None:
    def once(micro_tokens: int, slots: int, policy: str = "none") -> str:
        with (
            pytest.raises(PassTooLarge) as caught,
            lowers(tmp_path, micro_tokens, 60, policy, slots),
        ):
            raise MemoryError
        return str(caught.value)

    assert once(100, 4) == "MemoryError; going on with passes of at most 60 tokens"
    assert once(60, 4) == "MemoryError; going on with 2 slots"
    assert lowered_slots(4, tmp_path) == 2
    assert once(60, 2) == "MemoryError; going on with 1 slot"
    assert once(60, 1) == "MemoryError; going on with activation checkpointing full"
    with pytest.raises(MemoryError), lowers(tmp_path, 60, 60, "full", 1):
        raise MemoryError
    with pytest.raises(RuntimeError, match="shape"), lowers(tmp_path, 100, 60, "none", 4):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize(
    ("error", "yes"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("No space left on device"), False),
    ],
)
def test_names_of_a_full_memory(error: BaseException, yes: bool) -> None:
    assert is_out_of_memory(error) is yes


def test_passes_that_are_smaller_anyway_stay_so(tmp_path: Path) -> None:
    """As chosen for a smaller device than the one that ran out of memory."""
    (tmp_path / "budget.json").write_text('{"micro_tokens": 300}')
    for written, then in ((1000, 300), (200, 200), ("auto", 300)):
        changes = {"train.micro_tokens": written}
        config = make_config(tmp_path, tmp_path / "rows.jsonl", changes)
        assert lowered(config, tmp_path).train.micro_tokens == then
