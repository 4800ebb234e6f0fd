"""Parameters, gradients and moments sharded over ranks (FSDP2)."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.model.blocks import find_blocks
from raytune_ft.model.load import Precision
from raytune_ft.strategy.single import Grouped
from raytune_ft.tensors.write import Part


class Fsdp(Grouped):
    """torch's `fully_shard`: the repeated blocks one by one, then what is left around them.

    With `replicas`, weights are sharded over the inner mesh dimension and gradients all-reduced
    over the outer one.
    """

    takes_parts = True

    def __init__(self, parallel: ParallelConfig, precision: Precision) -> None:
        super().__init__(parallel, precision)
        self.mesh = self._mesh()

    def lay_out(self, model: nn.Module) -> nn.Module:
        """Shard in place; parameters become DTensors under their old names.

        The root is resharded after every forward in any case: a checkpoint that is loaded after
        the probe or an evaluation would otherwise be written beneath weights still gathered.
        """
        pinned = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        offload = pinned if self.parallel.offload == "all" else OffloadPolicy()
        shard = partial(
            fully_shard,
            mesh=self.mesh,
            mp_policy=self._mixed_precision(),
            offload_policy=offload,
        )
        for block in find_blocks(model).values():
            shard(block, reshard_after_forward=self.parallel.reshard_after_forward)
        shard(model, reshard_after_forward=True)
        home = torch.device("cpu") if self.parallel.offload == "all" else self.device
        model._apply(lambda t: torch.empty_like(t, device=home) if t.is_meta else t)
        self.model = model
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def loaded(self) -> None:
        """Blocks that the probe or an evaluation left gathered would hide what was loaded."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

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

    def _mixed_precision(self) -> MixedPrecisionPolicy:
        """Masters and sums of gradients stay in float32; what is gathered is what is computed in.

        Inputs are left alone: autocast treats them as it does in one process.
        """
        if self.precision != "bfloat16":
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)

    def _mesh(self) -> DeviceMesh:
        replicas = self.parallel.replicas
        if replicas == 1:
            return init_device_mesh(self.device.type, (self.world_size,))
        return init_device_mesh(
            self.device.type,
            (replicas, self.world_size // replicas),
            mesh_dim_names=("replicate", "shard"),
        )
