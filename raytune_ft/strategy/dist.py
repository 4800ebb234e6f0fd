"""What strategies of several processes share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from raytune_ft.strategy.base import T


def all_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    dist.all_reduce(values)
    return values


def from_rank_0(value: T, device: torch.device) -> T:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]
