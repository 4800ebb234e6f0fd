"""Parameters, gradients and moments sharded over ranks (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from raytune_ft.strategy.base import (
    MOMENTS,
    Held,
    Message,
    Shape,
    Traffic,
    WeightShape,
    held_bytes,
)
from raytune_ft.strategy.single import Grouped
from raytune_ft.tensors.write import Part


class Fsdp(Grouped):
    """torch's `fully_shard`, for each block and then for the weights around them.

    With `replicas`, weights are sharded over the inner dimension of the mesh and gradients
    all-reduced over the outer one.
    """

    takes_parts = True
    gathers = True
    casts_on_gathering = True

    def __init__(self, parallel: ParallelConfig, precision: Precision) -> None:
        super().__init__(parallel, precision)
        self.mesh = self._mesh()

    def lay_out(self, model: nn.Module) -> nn.Module:
        """Shard in place; parameters become DTensors and keep their names.

        The root is resharded after every forward in any case: otherwise weights that the probe or
        an evaluation gathered would hide a checkpoint that is loaded after it.
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

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are scattered in every pass, and all-reduced between replicas after the last
        one. Until then they would wait on the device, so that with weights in host memory they are
        all-reduced in every pass.
        """
        if self.parallel.replicas > 1 and self.parallel.offload != "all":
            assert isinstance(self.model, FSDPModule)
            self.model.set_requires_all_reduce(last)
        return nullcontext()

    def loaded(self) -> None:
        """Drop gathered weights of the probe or an evaluation, which would hide what was loaded."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def part(self, name: str, tensor: Tensor) -> Part:
        """Whole rows; replicas hold the same rows, and the first one saves them."""
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
        """Master weights and sums of gradients stay in float32; weights are gathered in bfloat16.

        Inputs are not cast: autocast does it, as in one process.
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

    @staticmethod
    def memory(shape: Shape, parallel: ParallelConfig) -> Held:
        """Rows of everything.

        Gathered are the root and, of the blocks, the one that is computed, the one that arrives and
        the one that is copied out of the received buffer. Gradients of a block are made in the
        dtype of the gathered weights and summed in that of the masters.
        """
        shards = parallel.max_workers // parallel.replicas
        trained = _share(shape, shards)
        block = max((_gathered(shape, block) for block in shape.blocks), default=0)
        gradients = max((_trained(block) for block in shape.blocks), default=0)
        whole = _gathered(shape, shape.root)
        if parallel.reshard_after_forward:
            whole += min(3, len(shape.blocks)) * block
        else:
            whole += sum(_gathered(shape, each) for each in shape.blocks) + block
        if shards == 1:
            whole = 0
        return Held(
            parameters=round(sum(w.share(shards) * shape.held(w) for w in shape.weights)),
            gradients=trained,
            between_passes=trained,
            optimizer=len(MOMENTS) * trained,
            buffers=0,
            gathered=whole + gradients * (shape.compute + shape.master),
            stepping=0,
            stepped=trained,
            snapshot=(1 + len(MOMENTS)) * trained,
        )

    @staticmethod
    def traffic(shape: Shape, parallel: ParallelConfig, micro_batches: int) -> Traffic:
        """Weights are gathered for forward and backward, and gradients scattered, in every pass;
        replicas sum gradients as `accumulate` says.
        """
        found = []
        across = micro_batches if parallel.offload == "all" else 1
        passes = 2 if parallel.reshard_after_forward else 1
        for number, group in enumerate((shape.root, *shape.blocks)):
            times = micro_batches * (2 if number == 0 else passes)
            found.append(Message("all-gather", _gathered(shape, group), times))
            gradients = _trained(group) * shape.master
            if gradients:
                found.append(Message("reduce-scatter", gradients, micro_batches))
                if parallel.replicas > 1:
                    part = gradients // (parallel.max_workers // parallel.replicas)
                    found.append(Message("all-reduce", part, across, across=True))
        return Traffic(tuple(found), gathers=passes)


def _share(shape: Shape, shards: int) -> int:
    return sum(w.share(shards) for w in shape.weights if w.trained) * shape.master


def _trained(weights: Iterable[WeightShape]) -> int:
    return sum(weight.size for weight in weights if weight.trained)


def _gathered(shape: Shape, weights: Sequence[WeightShape]) -> int:
    """Under bfloat16 all weights travel in it, else each as it is held."""
    if shape.compute < shape.master:
        return sum(weight.size for weight in weights) * shape.compute
    return held_bytes(shape, weights)
