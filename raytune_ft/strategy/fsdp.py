"""Parameters, gradients and moments sharded over ranks (FSDP2)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.model.blocks import find_blocks
from raytune_ft.model.build import Precision
from raytune_ft.strategy.group import Grouped
from raytune_ft.tensors.part import Part


class Fsdp(Grouped):
    """torch's `fully_shard`: the repeated blocks one by one, then what is left around them.

    With `replicas`, weights are sharded over the inner mesh dimension and gradients all-reduced
    over the outer one.
    """

    def __init__(self, parallel: ParallelConfig, precision: Precision) -> None:
        super().__init__(parallel, precision)
        self.mesh = self._mesh()

    def lay_out(self, model: nn.Module) -> nn.Module:
        """Shard in place; parameters become DTensors under their old names.

        The root is resharded after every forward in any case: a checkpoint that is loaded after
        the probe or an evaluation would otherwise be written beneath weights still gathered.
        """
        offload = CPUOffloadPolicy() if self.parallel.offload == "all" else OffloadPolicy()
        model.to(self.device)
        for block in find_blocks(model).values():
            fully_shard(
                block,
                mesh=self.mesh,
                reshard_after_forward=self.parallel.reshard_after_forward,
                offload_policy=offload,
            )
        fully_shard(model, mesh=self.mesh, reshard_after_forward=True, offload_policy=offload)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def part(self, name: str, tensor: Tensor) -> Part:
        """Whole rows; replicas hold the same ones, and the first of them saves."""
        assert isinstance(tensor, DTensor)
        mesh, placements = tensor.device_mesh, tensor.placements
        _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        first = all(
            at == 0
            for at, placement in zip(coordinate, placements, strict=True)
            if isinstance(placement, Replicate)
        )
        row = math.prod(tensor.shape[1:])
        return Part(tuple(tensor.shape), offset[0] * row, tensor.to_local().view(-1), first)

    def _mesh(self) -> DeviceMesh:
        replicas = self.parallel.replicas
        if replicas == 1:
            return init_device_mesh(self.device.type, (self.world_size,))
        return init_device_mesh(
            self.device.type,
            (replicas, self.world_size // replicas),
            mesh_dim_names=("replicate", "shard"),
        )
