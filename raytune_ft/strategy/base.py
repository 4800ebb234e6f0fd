"""What a strategy does. Training knows processes and shards through this protocol alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.model.load import Precision
from raytune_ft.strategy.side_channel import SideChannel
from raytune_ft.tensors.write import Part


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
    stepping: temporary tensors of the optimizer's step; a fused one makes none.
    stepped: the master weights that this worker's optimizer updates.
    snapshot: the copy that a checkpoint is written from.
    """

    parameters: int
    gradients: int
    between_passes: int
    optimizer: int
    buffers: int
    gathered: int
    stepping: int
    stepped: int
    snapshot: int
    keeps_gradients: bool = False

    @property
    def resident(self) -> int:
        """Bytes between steps."""
        kept = self.gradients if self.keeps_gradients else 0
        return self.parameters + self.optimizer + self.buffers + kept


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


T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")
OptimizerOf = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimizer of trained weights, which come by name. A group may have `lr_ratio`, by which
the learning rate is multiplied, and `waits`, the number of steps before its weights train."""


class Strategy(Protocol):
    """One process's view of the layout.

    The gradient of a step is the **sum** over ranks of what each computed in `backward`, so that
    a loss divided by the global number of label tokens gives the same gradient on any number of
    ranks.
    """

    rank: int
    world_size: int
    device: torch.device
    precision: Precision
    steps: int
    """Steps that the optimizer has taken since the beginning of the run."""
    takes_parts: bool
    """Whether `prepare` takes weights on the meta device, which are filled afterwards."""
    gathers: bool
    """Whether weights are gathered in each pass of the model, in which all ranks must take part."""
    casts_on_gathering: bool
    """Whether weights are gathered in the dtype of matrix products, so that no copies are cast."""

    def __init__(self, parallel: ParallelConfig, precision: Precision) -> None: ...

    def prepare(self, model: nn.Module, optimizer_of: OptimizerOf) -> nn.Module:
        """Lay the model out, build its optimizer and return the module to call. Called once.

        Parameters keep their names.
        """

    def lay_out(self, model: nn.Module) -> nn.Module:
        """Lay out a model that is measured and not trained, as far as this needs no optimizer."""

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """A context for forward and backward of a micro-batch; after the last one of a step,
        gradients are complete.
        """

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss."""

    def step(self, lr: float, max_norm: float | None) -> float:
        """Clip the gradient to `max_norm`, take a step and drop it; returns its global norm.

        A step with a norm that is not finite may spoil the weights.
        """

    def start_from(self, step: int) -> None:
        """Set the optimizer up as after `step` steps; its moments are filled in afterwards."""

    def loaded(self) -> None:
        """Called on all ranks at once, after a checkpoint was copied into the parts."""

    def parts(self, name: str) -> dict[str, Part]:
        """What this rank holds of a trained weight, under "", and of each of its `MOMENTS`."""

    def part(self, name: str, tensor: Tensor) -> Part:
        """What this rank holds of a parameter of the model, or of a tensor laid out like it."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""

    def from_rank0(self, value: T) -> T:
        """Rank 0's value, on every rank."""

    def side_channel(self) -> SideChannel:
        """A channel between the ranks for another thread; all ranks call this at once."""

    @staticmethod
    def memory(shape: Shape, parallel: ParallelConfig) -> Held:
        """What one worker holds of a model; `parallel` has a fixed number of workers."""

    @staticmethod
    def traffic(shape: Shape, parallel: ParallelConfig, micro_batches: int) -> Traffic:
        """What the workers send each other in a step of `micro_batches` passes."""
