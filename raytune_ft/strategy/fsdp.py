"""Parameters, gradients and moments sharded over ranks (FSDP2)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from raytune_ft.strategy.base import T
from raytune_ft.strategy.dist import all_sum, from_rank_0
from raytune_ft.strategy.single import Single


class Fsdp(Single):
    """torch's `fully_shard`: the repeated blocks one by one, then what is left around them."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.mesh = init_device_mesh(self.device.type, (self.world_size,))

    def wrap(self, model: nn.Module) -> nn.Module:
        """Shard in place; parameters become DTensors under their old names.

        The root is resharded after every forward too: a checkpoint that is loaded after the probe
        or an evaluation would otherwise be written beneath weights that are still gathered.
        """
        model.to(self.device)
        for block in _blocks(model):
            fully_shard(block, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh, reshard_after_forward=True)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Every backward reduces: keeping whole gradients until the last would undo sharding."""
        return nullcontext()

    def gather(self, tensor: Tensor) -> Tensor:
        """See `Strategy.gather`."""
        return super().gather(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)

    def shard(self, whole: Tensor, like: Tensor) -> Tensor:
        """See `Strategy.shard`; every rank has read `whole`, so nothing is sent."""
        whole = super().shard(whole, like)
        if not isinstance(like, DTensor):
            return whole
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)

    def sum(self, values: Tensor) -> Tensor:
        """See `Strategy.sum`."""
        return all_sum(values)

    def agree(self, value: T) -> T:
        """See `Strategy.agree`."""
        return from_rank_0(value, self.device)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks, as its class names them, outermost first."""
    classes: set[str] = set()
    for module in model.modules():
        classes |= set(getattr(module, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in classes]
