"""Memory by hand, for a model small enough to count on paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.estimate.activations import Plane, Traced
from raytune_ft.estimate.memory import Memory, MemoryModel, Work, held_by
from raytune_ft.estimate.parameters import Shell, Weight


def shell(trained: bool = True, precision: str = "float32") -> Shell:
    """40 elements around two blocks of 40; frozen, all but a 2 x 4 adapter in each block."""
    adapter = () if trained else (Weight((2, 4), True),)
    block = (Weight((4, 4), trained), Weight((6, 4), trained), *adapter)
    return Shell(
        module=nn.Module(),
        root=(Weight((10, 4), trained),),
        blocks=(block, block),
        hidden=4,
        vocabulary=10,
        heads_width=4,
        precision=precision,  # type: ignore[arg-type]
        frozen_dtype=getattr(torch, precision),
    )


def parallel(strategy: str, workers: int, **more: object) -> ParallelConfig:
    return ParallelConfig.model_validate({"strategy": strategy, "workers": workers, **more})


def test_one_worker_holds_weights_gradients_and_two_moments() -> None:
    held = held_by(shell(), parallel("single", 1))
    assert (held.parameters, held.gradients, held.optimizer) == (480, 480, 960)
    assert (held.buffers, held.gathered, held.snapshot) == (0, 0, 3 * 480)


def test_ddp_keeps_gradients_in_its_buckets_and_shares_the_writing_of_checkpoints() -> None:
    held = held_by(shell(), parallel("ddp", 2))
    assert (held.parameters, held.gradients, held.optimizer) == (480, 480, 960)
    assert (held.buffers, held.snapshot) == (0, 3 * 480 // 2)
    assert held.resident == 480 + 480 + 960


def test_fsdp_deals_rows_and_the_first_worker_has_the_largest_part() -> None:
    # 10, 4 and 6 rows over 4 workers are 3, 1 and 2.
    share = (3 + 2 * (1 + 2)) * 4
    held = held_by(shell(), parallel("fsdp", 4))
    assert (held.parameters, held.gradients) == (share * 4, share * 4)
    assert held.optimizer == 2 * share * 4
    # The root and both blocks whole, and a block's gradients twice.
    assert held.gathered == 4 * (40 + 2 * 40) + 40 * (4 + 4)


def test_replicas_shard_over_fewer_workers() -> None:
    assert held_by(shell(), parallel("fsdp", 4, replicas=2)).parameters == 240


def test_blocks_that_are_not_resharded_stay_whole() -> None:
    kept = held_by(shell(), parallel("fsdp", 2, reshard_after_forward=False))
    assert kept.gathered == 4 * (40 + 2 * 40 + 40) + 40 * (4 + 4)


def test_adapters_alone_have_gradients_and_moments() -> None:
    held = held_by(shell(trained=False, precision="bfloat16"), parallel("ddp", 2))
    assert held.parameters == 120 * 2 + 16 * 4
    assert (held.gradients, held.optimizer, held.buffers) == (64, 128, 0)


def test_bfloat16_travels_under_fsdp() -> None:
    held = held_by(shell(precision="bfloat16"), parallel("fsdp", 2))
    assert held.parameters == 240
    assert held.gathered == 2 * (40 + 2 * 40) + 40 * (2 + 4)


@pytest.mark.parametrize(
    ("stage", "parameters", "between_passes"), [(1, 480, 480), (2, 480, 240), (3, 240, 240)]
)
def test_stages_of_zero(stage: int, parameters: int, between_passes: int) -> None:
    held = held_by(shell(), parallel("deepspeed", 2, zero_stage=stage))
    assert held.parameters == parameters
    assert (held.gradients, held.between_passes) == (240, between_passes)
    assert held.optimizer == 3 * 240  # with the master weights


def estimate(
    monkeypatch: pytest.MonkeyPatch, layout: ParallelConfig, device: str, passes: int = 2
) -> Memory:
    """Of a model whose blocks keep 1000 bytes, 1100 at the most, and whose logits take 50."""
    plane = {(1, 1): 500, (1, 2): 1000}
    higher = {(1, 1): 600, (1, 2): 1100}
    traced = Traced(8, Plane(plane), Plane(higher))
    monkeypatch.setattr("raytune_ft.estimate.memory.trace", lambda *_: traced)
    monkeypatch.setattr("raytune_ft.estimate.memory.trace_head", lambda *_: 50)
    work = Work(1, 8, 4, passes, 8, 4)
    return MemoryModel(shell(), (1,), 8).estimate(layout, work, device)


def test_the_peak_is_the_worst_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    single = parallel("single", 1)
    # Weights and moments, gradients of the pass before, and the blocks' worst moment.
    assert estimate(monkeypatch, single, "cuda").peak == 480 + 960 + 480 + 1100
    # In a step of one pass the head's gradient alone is there by then.
    assert estimate(monkeypatch, single, "cuda", passes=1).peak == 480 + 960 + 1100 + 160
    # On a CPU the copy for checkpoints lies in the same memory.
    assert estimate(monkeypatch, single, "cpu").peak == 480 + 960 + 480 + 1100 + 1440


def test_what_is_offloaded_is_not_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = estimate(monkeypatch, parallel("fsdp", 2, offload="all"), "cuda")
    assert memory.offloaded == 240 + 240 + 480
    assert memory.peak == memory.gathered + 1100 + 160  # with the gradient of the head
    optimizer = parallel("deepspeed", 2, zero_stage=2, offload="optimizer")
    part = estimate(monkeypatch, optimizer, "cuda")
    assert part.offloaded == 3 * 240 + 240
    assert part.peak == 480 + part.buffers + 1100 + 160
