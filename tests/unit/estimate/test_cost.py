"""Messages, arithmetic and sweeps by hand."""

from __future__ import annotations

import pytest

from raytune_ft.config.schema import AshaConfig
from raytune_ft.estimate.cost import LINK_ACHIEVED, asha_share, messages, step_cost, step_flops
from raytune_ft.estimate.hardware import Hardware
from raytune_ft.estimate.work import Work
from tests.unit.estimate.test_memory import parallel, shell

WORK = Work(rows=1, width=8, labels=4, micro_batches=2, step_tokens=16, step_labels=8)


def hardware(nodes: int = 1, per_node: int = 4) -> Hardware:
    return Hardware("X", "cpu", nodes, per_node, None, None, 1.0, 100.0, 10.0, 1.0, "a test")


def test_ddp_reduces_its_gradients_once_a_step() -> None:
    (message,) = messages(shell(), parallel("ddp", 4), micro_batches=2)
    assert (message.kind, message.bytes, message.times) == ("all-reduce", 480, 1)


def test_fsdp_gathers_twice_a_micro_batch_and_scatters_once() -> None:
    found = messages(shell(), parallel("fsdp", 4), micro_batches=2)
    gathers = [m for m in found if m.kind == "all-gather"]
    scatters = [m for m in found if m.kind == "reduce-scatter"]
    assert [(m.bytes, m.times) for m in gathers] == [(160, 4)] * 3
    assert [(m.bytes, m.times) for m in scatters] == [(160, 2)] * 3
    kept = messages(shell(), parallel("fsdp", 4, reshard_after_forward=False), 2)
    assert [m.times for m in kept if m.kind == "all-gather"] == [4, 2, 2]


def test_a_ring_costs_its_rounds_and_its_bytes() -> None:
    cost = step_cost(shell(), parallel("ddp", 4), WORK, hardware(), state=0)
    bytes_s = 3 / 4 * 480 / (10.0 * LINK_ACHIEVED * 1e9)
    assert cost.messages_s == pytest.approx(2 * (bytes_s + 3 * 50e-6))
    assert cost.sent == 2 * 480 * 3 // 4
    assert step_cost(shell(), parallel("single", 1), WORK, hardware(), 0).messages_s == 0


def test_between_nodes_messages_are_slower() -> None:
    near = step_cost(shell(), parallel("ddp", 4), WORK, hardware(), 0)
    far = step_cost(shell(), parallel("ddp", 4), WORK, hardware(nodes=2, per_node=2), 0)
    assert far.messages_s > near.messages_s


def test_arithmetic_is_six_for_what_moves_and_four_for_what_does_not() -> None:
    scores = 3 * 4 * 4 * 8 / 2 * 2  # heads x width, causal, two blocks, forward and backward
    full = step_flops(shell(), parallel("single", 1), WORK)
    assert full == 16 * (6 * 80 + scores) + 8 * 6 * 40
    frozen = step_flops(shell(trained=False), parallel("single", 1), WORK)
    assert frozen == 16 * (4 * 80 + 6 * 16 + scores) + 8 * 4 * 40


def test_recomputation_is_another_forward() -> None:
    again = parallel("single", 1, activation_checkpointing="full")
    extra = step_flops(shell(), again, WORK) - step_flops(shell(), parallel("single", 1), WORK)
    assert extra == 16 * (2 * 80 + 4 * 4 * 8 / 2 * 2)


def test_halving_leaves_a_third_at_each_rung() -> None:
    scheduler = AshaConfig(grace_examples=100, reduction_factor=3)
    assert asha_share(scheduler, 900) == pytest.approx((100 + 200 / 3 + 600 / 9) / 900)
    assert asha_share(None, 900) == asha_share(scheduler, 100) == 1.0
