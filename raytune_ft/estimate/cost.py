"""How long a step takes: arithmetic at the rate that the hardware achieves, and messages.

Collectives follow the alpha-beta model of rings: each of the n - 1 rounds costs a latency, and
bytes travel at the speed of the slowest link. Between nodes that is the network, which all workers
of a node share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.estimate.hardware import Hardware
from raytune_ft.estimate.memory import Work, held_by
from raytune_ft.estimate.parameters import Shell
from raytune_ft.strategy import strategy_class
from raytune_ft.strategy.base import Held, Message, Traffic

Lengths = npt.NDArray[np.integer[Any]]
LATENCY_S = {"cpu": (50e-6, 100e-6), "cuda": (5e-6, 15e-6)}  # inside a node, between nodes
OVERLAP = {"cpu": 0.0, "cuda": 0.8}
"""The share of arithmetic during which messages can be sent; on a CPU the same cores do both."""
LINK_ACHIEVED = 0.8
# GB/s of offloaded tensors: copies go over PCIe (4.0 x16), and the optimizer runs at the speed of
# host memory, which the workers of a node share.
HOST_LINK, HOST_BANDWIDTH = 25.0, 200.0


@dataclass(frozen=True)
class StepCost:
    """Seconds of one optimizer step, and the bytes that one worker sends in it."""

    compute_s: float
    messages_s: float
    optimizer_s: float
    step_s: float
    sent: int


def step_cost(shell: Shell, parallel: ParallelConfig, work: Work, hardware: Hardware) -> StepCost:
    """The cost of a step under a layout whose strategy is concrete."""
    compute_s = step_flops(shell, parallel, work) / (hardware.tflops * 1e12)
    strategy = strategy_class(parallel.strategy)
    held = held_by(shell, parallel)
    traffic = strategy.traffic(shell, parallel, work.micro_batches)
    messages_s, sent = 0.0, 0
    for message in traffic.messages:
        size = _group(parallel, message)
        messages_s += message.times * _ring_s(message, size, parallel, hardware)
        sent += message.times * message.factor * message.bytes * (size - 1) // max(1, size)
    offloads = parallel.offload != "none" and hardware.device == "cuda"
    bandwidth = HOST_BANDWIDTH / hardware.per_node if offloads else hardware.bandwidth
    # Weights, gradients and two moments are read, and all except gradients written.
    optimizer_s = (4 + 3) * held.stepped / (bandwidth * 1e9)
    if offloads:
        optimizer_s += _copied(parallel, work, held, traffic) / (HOST_LINK * 1e9)
    hidden = OVERLAP[hardware.device] * compute_s * traffic.overlap
    exposed = max(0.0, messages_s - hidden)
    return StepCost(compute_s, messages_s, optimizer_s, compute_s + exposed + optimizer_s, sent)


def _copied(parallel: ParallelConfig, work: Work, held: Held, traffic: Traffic) -> int:
    """Bytes between host and device in a step: gradients one way and new weights the other; where
    weights are offloaded too, a worker's share of them each time that they are gathered, and
    gradients after each backward.
    """
    if parallel.offload == "optimizer":
        return 2 * held.stepped
    return work.micro_batches * (traffic.gathers * held.parameters + held.stepped)


def step_flops(shell: Shell, parallel: ParallelConfig, work: Work) -> float:
    """FLOPs of one worker in one step: per weight and token two forward, two backward and two for
    the gradient of a trained weight (arXiv 2001.08361), plus the scores of attention.

    The head is applied to label tokens alone; an embedding is only looked up.
    """
    forward = backward = 0.0
    for block in shell.blocks:
        for weight in block:
            if len(weight.shape) > 1:
                forward += 2.0 * weight.size * weight.active
                backward += 2.0 * weight.size * weight.active * (2 if weight.trained else 1)
    scores = 4.0 * shell.heads_width * work.width / 2 * len(shell.blocks)
    again = forward + scores if parallel.activation_checkpointing == "full" else 0.0
    trained_head = any(w.trained for w in shell.root)
    head = 2.0 * shell.vocabulary * shell.hidden * (3 if trained_head else 2)
    per_token = forward + backward + 3 * scores + again
    return work.step_tokens * per_token + work.step_labels * head


def flops_a_token(shell: Shell, lengths: Lengths, label_counts: Lengths) -> float:
    """FLOPs of a step for each of its tokens that is no padding, on average over examples of these
    lengths: what has to be computed under any layout, so nothing twice.
    """
    tokens, labels = int(lengths.sum()), int(label_counts.sum())
    seen = round(float(np.square(lengths, dtype=np.float64).sum()) / tokens)
    work = Work(1, seen, labels, 1, step_tokens=tokens, step_labels=labels)
    return step_flops(shell, ParallelConfig(activation_checkpointing="none"), work) / tokens


def evaluation_flops(shell: Shell, tokens: int, labels: int) -> float:
    """FLOPs of a forward pass over `tokens` tokens, `labels` of which go through the head; without
    the scores of attention.
    """
    products = (w for block in shell.blocks for w in block if len(w.shape) > 1)
    per_token = 2.0 * sum(w.size * w.active for w in products)
    return tokens * per_token + labels * 2.0 * shell.vocabulary * shell.hidden


def _group(parallel: ParallelConfig, message: Message) -> int:
    if parallel.replicas == 1:
        return parallel.max_workers
    return parallel.replicas if message.across else parallel.max_workers // parallel.replicas


def _ring_s(message: Message, size: int, parallel: ParallelConfig, hardware: Hardware) -> float:
    if size == 1:
        return 0.0
    inside, between = LATENCY_S[hardware.device]
    one_node = not message.across and size <= hardware.per_node
    if message.across:  # every worker of a node is in another ring, and they share the network
        speed = hardware.network / hardware.per_node
    else:
        speed = hardware.link if one_node else min(hardware.link, hardware.network)
    latency = inside if one_node else between
    seconds = (size - 1) / size * message.bytes / (speed * LINK_ACHIEVED * 1e9)
    return message.factor * (seconds + (size - 1) * latency)
