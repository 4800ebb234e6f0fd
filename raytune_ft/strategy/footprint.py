"""What a strategy says about its memory and messages, for the estimates of `plan`.

`Shape` is what it is asked about: a model without its weights, as estimate/parameters.py makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class WeightShape(Protocol):
    """One parameter."""

    @property
    def trained(self) -> bool:
        """Whether it requires a gradient."""

    @property
    def size(self) -> int:
        """Elements."""

    def share(self, workers: int) -> int:
        """Elements of the largest part when rows are dealt to `workers`."""


class Shape(Protocol):
    """A model: the weights of each block, and `root`, those around the blocks."""

    @property
    def root(self) -> Sequence[WeightShape]:
        """Embeddings, the last norm, the head."""

    @property
    def blocks(self) -> Sequence[Sequence[WeightShape]]:
        """The weights of each block."""

    @property
    def weights(self) -> Sequence[WeightShape]:
        """Root and blocks."""

    @property
    def total(self) -> int:
        """Elements of all weights."""

    @property
    def trained(self) -> int:
        """Elements of the trained weights."""

    @property
    def master(self) -> int:
        """Bytes of an element that is trained, of its gradient and of each moment."""

    @property
    def compute(self) -> int:
        """Bytes of an element in a matrix product."""

    def held(self, weight: Any) -> float:
        """Bytes of an element as it is held between steps."""


@dataclass(frozen=True)
class Held:
    """Bytes of one worker, without activations.

    parameters, optimizer, buffers: at any time; the optimizer's include master weights beside the
        parameters, and buffers hold gradients on their way to other workers.
    gradients: when the optimizer steps. between_passes: between two passes of a step.
    keeps_gradients: the memory of gradients is not freed after a step.
    gathered: weights of other workers and gradients of a block, during a pass.
    stepping_cpu, stepping_cuda: temporary tensors of the optimizer's step.
    stepped: the master weights that this worker's optimizer updates.
    snapshot: the copy that a checkpoint is written from.
    """

    parameters: int
    gradients: int
    between_passes: int
    optimizer: int
    buffers: int
    gathered: int
    stepping_cpu: int
    stepping_cuda: int
    stepped: int
    snapshot: int
    keeps_gradients: bool = False

    @property
    def resident(self) -> int:
        """Bytes between steps."""
        return self.parameters + self.optimizer + self.buffers


@dataclass(frozen=True)
class Message:
    """A collective over the workers that is made `times` a step, of `bytes` before it is divided.

    across: it is made between replicas, not inside one.
    """

    kind: str
    bytes: int
    times: int
    across: bool = False

    @property
    def factor(self) -> int:
        """Rounds of a ring; an all-reduce is a reduce-scatter and an all-gather."""
        return 2 if self.kind == "all-reduce" else 1


@dataclass(frozen=True)
class Traffic:
    """The messages of a step.

    overlap: the share of the step's arithmetic during which they can be sent.
    gathers: how often a pass gathers the weights.
    """

    messages: tuple[Message, ...] = ()
    overlap: float = 1.0
    gathers: int = 2


def held_bytes(shape: Shape, weights: Iterable[WeightShape]) -> int:
    """Bytes of some weights as they are held between steps."""
    return round(sum(weight.size * shape.held(weight) for weight in weights))


def largest(shape: Shape, shards: int) -> int:
    """Bytes of the largest trained weight, when each is dealt to `shards`."""
    return max((w.share(shards) for w in shape.weights if w.trained), default=0) * shape.master
