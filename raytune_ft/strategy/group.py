"""What strategies of several processes share."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.model.load import Precision
from raytune_ft.strategy.base import T
from raytune_ft.strategy.exchange import Exchange, Group
from raytune_ft.strategy.single import Single


class Grouped(Single):
    """One rank of the default process group."""

    def __init__(self, parallel: ParallelConfig, precision: Precision) -> None:
        super().__init__(parallel, precision)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum(self, values: Tensor) -> Tensor:
        """See `Strategy.sum`."""
        dist.all_reduce(values)
        return values

    def agree(self, value: T) -> T:
        """See `Strategy.agree`."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def exchange(self) -> Exchange:
        """See `Strategy.exchange`."""
        return Group()
