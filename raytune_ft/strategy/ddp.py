"""A whole copy of the model on every rank; gradients are all-reduced once a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytune_ft.model.unused_parameters import unreached
from raytune_ft.strategy.single import Grouped
from raytune_ft.tensors.write import Part


class Ddp(Grouped):
    """torch's DistributedDataParallel over the default process group."""

    wrapped: DistributedDataParallel

    def lay_out(self, model: nn.Module) -> nn.Module:
        """Buffers of a language model never change, so they are not sent again every step.

        Looking for weights that a step did not use costs a walk over its graph, and is needed for
        models that hold some which text does not reach, such as a vision tower. A frozen model has
        no gradients to reduce, and torch refuses it.
        """
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model.to(self.device)
        self.wrapped = DistributedDataParallel(
            model.to(self.device),
            forward_sync_buffers=False,
            find_unused_parameters=bool(unreached(model, self.device, self.precision)),
        )
        return self.wrapped

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Only the last backward of a step communicates."""
        return nullcontext() if last else self.wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        """DistributedDataParallel averages over ranks; a sum is wanted."""
        (loss * self.world_size).backward()

    def part(self, name: str, tensor: Tensor) -> Part:
        """All of it, on every rank; each saves some of the weights."""
        shape = tuple(tensor.shape)
        return Part(shape, 0, tensor.view(-1), writes=self._writers[name] == self.rank)

    @cached_property
    def _writers(self) -> dict[str, int]:
        """Weights to ranks, the largest first and each to who has the least so far."""
        loads = [0] * self.world_size
        found = {}
        for name, parameter in sorted(self.parameters.items(), key=lambda item: -item[1].numel()):
            rank = loads.index(min(loads))
            loads[rank] += parameter.numel()
            found[name] = rank
        return found
