"""Messages, arithmetic and sweeps by hand."""

from __future__ import annotations

import numpy as np
import pytest

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.estimate.cost import (
    HOST_BANDWIDTH,
    HOST_LINK,
    LINK_ACHIEVED,
    evaluation_flops,
    flops_a_token,
    step_cost,
    step_flops,
)
from raytune_ft.estimate.hardware import Hardware
from raytune_ft.estimate.memory import Work
from raytune_ft.strategy import strategy_class
from raytune_ft.strategy.base import Message
from tests.unit.estimate.test_memory import parallel, shell

WORK = Work(rows=1, width=8, labels=4, micro_batches=2, step_tokens=16, step_labels=8)


def hardware(nodes: int = 1, per_node: int = 4, device: str = "cpu") -> Hardware:
    return Hardware("X", device, nodes, per_node, None, None, 1.0, 100.0, 10.0, 1.0, "a test")


def messages(layout: ParallelConfig, micro_batches: int) -> tuple[Message, ...]:
    return strategy_class(layout.strategy).traffic(shell(), layout, micro_batches).messages


def test_ddp_reduces_its_gradients_once_a_step() -> None:
    (message,) = messages(parallel("ddp", 4), micro_batches=2)
    assert (message.kind, message.bytes, message.times) == ("all-reduce", 480, 1)


def test_fsdp_gathers_twice_a_micro_batch_and_scatters_once() -> None:
    found = messages(parallel("fsdp", 4), micro_batches=2)
    gathers = [m for m in found if m.kind == "all-gather"]
    scatters = [m for m in found if m.kind == "reduce-scatter"]
    assert [(m.bytes, m.times) for m in gathers] == [(160, 4)] * 3
    assert [(m.bytes, m.times) for m in scatters] == [(160, 2)] * 3
    kept = messages(parallel("fsdp", 4, reshard_after_forward=False), 2)
    assert [m.times for m in kept if m.kind == "all-gather"] == [4, 2, 2]


def test_a_ring_costs_its_rounds_and_its_bytes() -> None:
    cost = step_cost(shell(), parallel("ddp", 4), WORK, hardware())
    bytes_s = 3 / 4 * 480 / (10.0 * LINK_ACHIEVED * 1e9)
    assert cost.messages_s == pytest.approx(2 * (bytes_s + 3 * 50e-6))
    assert cost.sent == 2 * 480 * 3 // 4
    assert step_cost(shell(), parallel("single", 1), WORK, hardware()).messages_s == 0


def test_between_nodes_messages_are_slower() -> None:
    near = step_cost(shell(), parallel("ddp", 4), WORK, hardware())
    far = step_cost(shell(), parallel("ddp", 4), WORK, hardware(nodes=2, per_node=2))
    assert far.messages_s > near.messages_s


@pytest.mark.parametrize(
    ("layout", "stepped"),
    [
        (parallel("ddp", 2), 64),
        (parallel("fsdp", 2), 32),
        (parallel("fsdp", 4, replicas=2), 32),
        (parallel("deepspeed", 4), 16),
    ],
)
def test_the_optimizer_steps_through_what_moves(layout: ParallelConfig, stepped: int) -> None:
    # Two adapters of 2 x 4 in float32; weights, gradients and two moments read, three written.
    cost = step_cost(shell(trained=False), layout, WORK, hardware())
    assert cost.optimizer_s == pytest.approx(7 * stepped / 100e9)


@pytest.mark.parametrize("trained", [True, False])
def test_offloaded_weights_go_up_for_each_pass_and_gradients_down(trained: bool) -> None:
    # Of rows over 2 workers: 5, 2 and 3 of 4 elements, twice the latter, and 1 of an adapter.
    model, gpu = shell(trained), hardware(per_node=2, device="cuda")
    weights = (5 + 2 * (2 + 3)) * 4 * 4
    stepped = weights if trained else 2 * 4 * 4
    weights += 0 if trained else stepped
    step_s = 7 * stepped / (HOST_BANDWIDTH / 2 * 1e9)
    whole = step_cost(model, parallel("fsdp", 2, offload="all"), WORK, gpu)
    copied = 2 * (2 * weights + stepped)
    assert whole.optimizer_s == pytest.approx(step_s + copied / (HOST_LINK * 1e9))
    kept = parallel("fsdp", 2, offload="all", reshard_after_forward=False)
    copied = 2 * (weights + stepped)
    found = step_cost(model, kept, WORK, gpu).optimizer_s
    assert found == pytest.approx(step_s + copied / (HOST_LINK * 1e9))


def test_an_offloaded_optimizer_takes_gradients_and_gives_weights() -> None:
    layout = parallel("deepspeed", 2, offload="optimizer", zero_stage=2)
    cost = step_cost(shell(trained=False), layout, WORK, hardware(per_node=2, device="cuda"))
    step_s = 7 * 32 / (HOST_BANDWIDTH / 2 * 1e9)
    assert cost.optimizer_s == pytest.approx(step_s + 2 * 32 / (HOST_LINK * 1e9))


def test_an_evaluation_passes_blocks_and_label_tokens_through_the_head() -> None:
    assert evaluation_flops(shell(), tokens=16, labels=8) == 16 * 2 * 80 + 8 * 2 * 40
    # Adapters take part, and the embedding is only looked up.
    assert evaluation_flops(shell(trained=False), 16, 0) == 16 * 2 * (80 + 16)


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


def test_what_a_token_costs_depends_on_no_layout() -> None:
    lengths, labels = np.array([4, 8], np.int32), np.array([2, 2], np.int32)
    # 80 weights in two blocks, and scores of the (16 + 64) / 12 tokens that one sees of both sides.
    of_blocks = 6 * 80 + 3 * 4 * 4 * 7 / 2 * 2
    of_head = 4 * 6 * 40
    assert flops_a_token(shell(), lengths, labels) == (12 * of_blocks + of_head) / 12
    many = np.full(100_000, 30_000, np.int32)  # whose sum is above 2^31
    assert flops_a_token(shell(), many, many) > 0
