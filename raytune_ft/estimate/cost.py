"""How long a step takes: arithmetic at the rate the hardware achieves, and messages of workers.

Collectives follow the alpha-beta model of rings: each of the n - 1 rounds costs a latency, and
bytes go at the speed of the slowest link on the way. Over several nodes that is the network, which
all workers of a node share.
"""

from __future__ import annotations

from dataclasses import dataclass

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.estimate.hardware import Hardware
from raytune_ft.estimate.memory import Work, held_by
from raytune_ft.estimate.parameters import Shell, elements

LATENCY_S = {"cpu": (50e-6, 100e-6), "cuda": (5e-6, 15e-6)}  # inside a node, between nodes
OVERLAP = {"cpu": 0.0, "cuda": 0.8}
"""The share of arithmetic behind which messages hide; on a CPU the same cores do both."""
LINK_ACHIEVED = 0.8
# What is offloaded goes over PCIe (4.0 x16), and the optimizer steps at the speed of host memory,
# which the workers of a node share.
HOST_LINK, HOST_BANDWIDTH = 25.0, 200.0


@dataclass(frozen=True)
class Message:
    """A collective over `groups` of a job's workers that is made `times` a step."""

    kind: str
    bytes: int
    times: int
    across: bool = False  # between replicas, and not inside one

    @property
    def factor(self) -> int:
        """An all-reduce is a reduce-scatter and an all-gather."""
        return 2 if self.kind == "all-reduce" else 1


@dataclass(frozen=True)
class StepCost:
    """Seconds of one optimizer step, and the bytes that one worker sends in it."""

    compute_s: float
    messages_s: float
    optimizer_s: float
    step_s: float
    sent: int


def step_cost(shell: Shell, parallel: ParallelConfig, work: Work, hardware: Hardware) -> StepCost:
    """`parallel.strategy` is concrete."""
    compute_s = step_flops(shell, parallel, work) / (hardware.tflops * 1e12)
    messages_s, sent = 0.0, 0
    for message in messages(shell, parallel, work.micro_batches):
        size = _group(parallel, message)
        messages_s += message.times * _ring_s(message, size, parallel, hardware)
        sent += message.times * message.factor * message.bytes * (size - 1) // max(1, size)
    stepped = stepped_bytes(shell, parallel)
    offloads = parallel.offload != "none" and hardware.device == "cuda"
    bandwidth = HOST_BANDWIDTH / hardware.per_node if offloads else hardware.bandwidth
    # Weights, gradients and two moments are read, and all but gradients written.
    optimizer_s = (4 + 3) * stepped / (bandwidth * 1e9)
    if offloads:
        optimizer_s += _copied(shell, parallel, work, stepped) / (HOST_LINK * 1e9)
    hidden = OVERLAP[hardware.device] * compute_s
    if parallel.strategy == "ddp":
        hidden *= 2 / 3 / work.micro_batches  # behind the last backward alone
    exposed = max(0.0, messages_s - hidden)
    return StepCost(compute_s, messages_s, optimizer_s, compute_s + exposed + optimizer_s, sent)


def stepped_bytes(shell: Shell, parallel: ParallelConfig) -> int:
    """The master weights that one worker's optimizer moves; each moment takes as much again."""
    if parallel.strategy == "fsdp":
        shards = parallel.max_workers // parallel.replicas
        return sum(w.share(shards) for w in shell.weights if w.trained) * shell.master
    workers = parallel.max_workers if parallel.strategy == "deepspeed" else 1
    return -(-shell.trained // workers) * shell.master


def _copied(shell: Shell, parallel: ParallelConfig, work: Work, stepped: int) -> int:
    """Between host and device: gradients down and new weights up once; or, where weights are kept
    in host memory, a worker's share of all of them up for each time that they are gathered, and
    gradients down after each backward.
    """
    if parallel.offload == "optimizer":
        return 2 * stepped
    keeps = parallel.strategy == "fsdp" and not parallel.reshard_after_forward
    gathered = (1 if keeps else 2) * held_by(shell, parallel).parameters
    return work.micro_batches * (gathered + stepped)


def step_flops(shell: Shell, parallel: ParallelConfig, work: Work) -> float:
    """Of one worker in one step: two a weight and token forward, two through it backward, two for
    its own gradient if it moves (arXiv 2001.08361); attention's scores come on top.

    The head sees label tokens alone; an embedding is only looked up.
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


def evaluation_flops(shell: Shell, tokens: int, labels: int) -> float:
    """Of a forward pass over so many tokens, without attention's scores; the head sees `labels`."""
    products = (w for block in shell.blocks for w in block if len(w.shape) > 1)
    per_token = 2.0 * sum(w.size * w.active for w in products)
    return tokens * per_token + labels * 2.0 * shell.vocabulary * shell.hidden


def messages(shell: Shell, parallel: ParallelConfig, micro_batches: int) -> list[Message]:
    """What workers tell each other in a step."""
    trained = shell.trained * shell.master
    if parallel.strategy == "ddp":
        return [Message("all-reduce", trained, 1)]
    if parallel.strategy == "fsdp":
        return _fsdp(shell, parallel, micro_batches)
    if parallel.strategy == "deepspeed":
        if parallel.zero_stage == 1:
            return [Message("reduce-scatter", trained, 1), Message("all-gather", trained, 1)]
        reduce = Message("reduce-scatter", trained, micro_batches)
        if parallel.zero_stage == 2:
            return [reduce, Message("all-gather", trained, 1)]
        held = round(sum(w.size * shell.held(w) for w in shell.weights))
        blocks = max(1, len(shell.blocks))
        return [reduce, Message("all-gather", held // blocks, 2 * blocks * micro_batches)]
    return []


def _fsdp(shell: Shell, parallel: ParallelConfig, micro_batches: int) -> list[Message]:
    found = []
    passes = 2 if parallel.reshard_after_forward else 1
    each = shell.compute if shell.compute < shell.master else None
    for number, group in enumerate((shell.root, *shell.blocks)):
        gathered = round(sum(w.size * (each or shell.held(w)) for w in group))
        times = micro_batches * (2 if number == 0 else passes)
        found.append(Message("all-gather", gathered, times))
        moving = elements(group, trained=True) * shell.master
        if moving:
            found.append(Message("reduce-scatter", moving, micro_batches))
            if parallel.replicas > 1:
                shards = parallel.max_workers // parallel.replicas
                found.append(Message("all-reduce", moving // shards, micro_batches, across=True))
    return found


def _group(parallel: ParallelConfig, message: Message) -> int:
    if parallel.replicas == 1:
        return parallel.max_workers
    return parallel.replicas if message.across else parallel.max_workers // parallel.replicas


def _ring_s(message: Message, size: int, parallel: ParallelConfig, hardware: Hardware) -> float:
    if size == 1:
        return 0.0
    inside, between = LATENCY_S[hardware.device]
    one_node = not message.across and size <= hardware.per_node
    if message.across:  # each worker of a node is in a ring of its own, and they share the network
        speed = hardware.network / hardware.per_node
    else:
        speed = hardware.link if one_node else min(hardware.link, hardware.network)
    latency = inside if one_node else between
    seconds = (size - 1) / size * message.bytes / (speed * LINK_ACHIEVED * 1e9)
    return message.factor * (seconds + (size - 1) * latency)
