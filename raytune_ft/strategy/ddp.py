"""A whole copy of the model on every rank; gradients are all-reduced once a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytune_ft.strategy.base import T
from raytune_ft.strategy.dist import all_sum, from_rank_0
from raytune_ft.strategy.single import Single


class Ddp(Single):
    """torch's DistributedDataParallel over the default process group."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.loss_factor = float(self.world_size)  # DistributedDataParallel averages

    def wrap(self, model: nn.Module) -> nn.Module:
        """Buffers of a language model never change, so they are not sent again every step."""
        return DistributedDataParallel(model.to(self.device), forward_sync_buffers=False)

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Only the last backward of a step communicates."""
        assert isinstance(model, DistributedDataParallel)
        return nullcontext() if last else model.no_sync()

    def sum(self, values: Tensor) -> Tensor:
        """See `Strategy.sum`."""
        return all_sum(values)

    def agree(self, value: T) -> T:
        """See `Strategy.agree`."""
        return from_rank_0(value, self.device)
