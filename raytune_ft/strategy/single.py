"""One process: the reference that every other layout is held to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from raytune_ft.strategy.base import T


def local_device() -> torch.device:
    """The accelerator that this process was given, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Single:
    """No communication. The base of `Ddp`, whose tensors are whole too."""

    rank = 0
    world_size = 1
    loss_factor = 1.0

    def __init__(self) -> None:
        self.device = local_device()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Only moved to the device."""
        return model.to(self.device)

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Gradients add up by themselves."""
        return nullcontext()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
        """See `Strategy.clip`."""
        limit = math.inf if max_norm is None else max_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def gather(self, tensor: Tensor) -> Tensor:
        """A copy, so that training may go on while it is written."""
        return tensor.detach().to("cpu", copy=True)

    def shard(self, whole: Tensor, like: Tensor) -> Tensor:
        """All of it."""
        return whole.to(like.device, like.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """Nothing to add."""
        return values

    def agree(self, value: T) -> T:
        """Nobody to disagree with."""
        return value
