"""What a strategy answers for. The loop knows nothing else of processes and shards."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Strategy(Protocol):
    """One process's view of the layout.

    Gradients after a step's last backward are the **sum** over ranks of what each computed
    (`loss_factor` undoes an average where the library takes one), so that a loss divided by the
    global number of label tokens gives the same gradient on any number of ranks.
    """

    rank: int
    world_size: int
    device: torch.device
    loss_factor: float

    def __init__(self) -> None: ...

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call; parameters keep their names and are final after this."""

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; gradients are whole after the last."""

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
        """Global gradient norm, after which gradients are scaled down to `max_norm`."""

    def gather(self, tensor: Tensor) -> Tensor:
        """A whole copy on the CPU of a tensor that may be sharded; every rank must call it."""

    def shard(self, whole: Tensor, like: Tensor) -> Tensor:
        """The part of `whole` that this rank holds, laid out as `like`."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""

    def agree(self, value: T) -> T:
        """Rank 0's value, on every rank: for what each could find out, but not surely alike."""
