"""What a strategy does. Training knows processes and shards through this protocol alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.model.load import Precision
from raytune_ft.strategy.footprint import Held, Shape, Traffic
from raytune_ft.strategy.side_channel import SideChannel
from raytune_ft.tensors.write import Part

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
    takes_parts: bool
    """Whether `prepare` takes weights on the meta device, which are filled afterwards."""
    casts_on_gathering: bool
    """Whether weights are gathered in the dtype of matrix products, so that no copies are cast."""

    def __init__(self, parallel: ParallelConfig, precision: Precision) -> None: ...

    def prepare(self, model: nn.Module, optimizer_of: OptimizerOf) -> nn.Module:
        """Lay the model out, build its optimizer and return the module to call. Called once.

        Parameters keep their names.
        """

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
