"""What a strategy answers for. The loop knows nothing else of processes and shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.model.load import Precision
from raytune_ft.strategy.exchange import Exchange
from raytune_ft.tensors.write import Part

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")
OptimizerOf = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
"""From trained weights by their names. A group may have a `lr_ratio`, by which the rate is
multiplied, and `waits`, the number of steps of the run before its weights begin to move."""


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
    """May `prepare` be given weights on the meta device, to be filled afterwards?"""

    def __init__(self, parallel: ParallelConfig, precision: Precision) -> None: ...

    def prepare(self, model: nn.Module, optimizer_of: OptimizerOf) -> nn.Module:
        """Lay the model out, build its optimizer; the module to call. Called once.

        Parameters keep the names that `model.named_parameters()` gives before.
        """

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; gradients are whole after the last."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss."""

    def step(self, lr: float, max_norm: float | None) -> float:
        """Scale the gradient down to `max_norm`, take a step with it, forget it; its global norm.

        Where the norm is not finite, weights are lost.
        """

    def start_from(self, step: int) -> None:
        """Bring the optimizer to where it is after `step` steps, with moments still to fill in."""

    def loaded(self) -> None:
        """Train with what was just copied into the parts; all ranks call it at once."""

    def parts(self, name: str) -> dict[str, Part]:
        """What this rank holds of a trained weight, under "", and of each of its `MOMENTS`."""

    def part(self, name: str, tensor: Tensor) -> Part:
        """What this rank holds of a parameter of the model, or of a tensor laid out like it."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""

    def agree(self, value: T) -> T:
        """Rank 0's value, on every rank: for what each could find out, but not surely alike."""

    def exchange(self) -> Exchange:
        """A line between the ranks for a thread beside the training; all ranks call it at once."""
