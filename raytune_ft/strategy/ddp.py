"""A whole copy of the model on every rank; gradients are all-reduced once a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.model.probe import unreached
from raytune_ft.strategy.base import Held, Message, Shape, Traffic
from raytune_ft.strategy.single import Grouped
from raytune_ft.tensors.write import Part


class Ddp(Grouped):
    """torch's DistributedDataParallel over the default process group."""

    wrapped: DistributedDataParallel

    def lay_out(self, model: nn.Module) -> nn.Module:
        """Buffers of a language model never change, so they are not broadcast.

        To look for unused parameters costs a walk over the graph of every step; it is on only for
        models with weights that text does not reach, such as a vision tower. A frozen model has no
        gradients to reduce, and torch refuses to wrap it.

        Gradients are views of the buckets in which they are reduced, from the beginning and between
        steps: one that is dropped would be made beside its bucket in the next step. Where some
        weights may get none in a step, they are dropped all the same, since AdamW skips a weight
        without a gradient and not one whose gradient is zero.
        """
        model.to(self.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            return model
        idle = unreached(model, self.device, self.precision)
        self.keeps_gradients = not idle
        for parameter in trained if self.keeps_gradients else ():
            parameter.grad = torch.zeros_like(parameter)
        self.wrapped = DistributedDataParallel(
            model,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=bool(idle),
        )
        return self.wrapped

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Only the last backward of a step communicates."""
        return nullcontext() if last else self.wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Scale the loss, since DistributedDataParallel averages over ranks and a sum is needed."""
        (loss * self.world_size).backward()

    def part(self, name: str, tensor: Tensor) -> Part:
        """The whole tensor, on every rank; each rank saves some of the weights."""
        shape = tuple(tensor.shape)
        return Part(shape, 0, tensor.view(-1), writes=self._writers[name] == self.rank)

    @cached_property
    def _writers(self) -> dict[str, int]:
        """The rank that saves each weight; largest first, each to the least loaded rank."""
        loads = [0] * self.world_size
        found = {}
        for name, parameter in sorted(self.parameters.items(), key=lambda item: -item[1].numel()):
            rank = loads.index(min(loads))
            loads[rank] += parameter.numel()
            found[name] = rank
        return found

    @staticmethod
    def memory(shape: Shape, parallel: ParallelConfig) -> Held:
        """A whole copy, and gradients between steps too."""
        return replace(Grouped.memory(shape, parallel), keeps_gradients=True)

    @staticmethod
    def traffic(shape: Shape, parallel: ParallelConfig, micro_batches: int) -> Traffic:
        """One all-reduce, during the last backward."""
        reduce = Message("all-reduce", shape.trained * shape.master, 1)
        return Traffic((reduce,), overlap=2 / 3 / micro_batches)
