"""One process, and what all strategies share. Every other layout must give the same numbers."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.model.load import Precision
from raytune_ft.model.methods import trained_parameters
from raytune_ft.strategy.base import (
    MOMENTS,
    Held,
    OptimizerOf,
    Shape,
    T,
    Traffic,
    held_bytes,
)
from raytune_ft.strategy.numerics import settle
from raytune_ft.strategy.products import widen_where_slow
from raytune_ft.strategy.side_channel import Alone, Group, SideChannel
from raytune_ft.tensors.write import Part


def local_device(parallel: ParallelConfig) -> torch.device:
    """The accelerator that this process was given, else the CPU, also where the config keeps
    workers off GPUs. Where `auto` is not resolved, the accelerator is taken.
    """
    written = parallel.resources_per_worker
    kept_off = isinstance(written, dict) and parallel.device == "cpu"
    if torch.cuda.is_available() and not kept_off:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Single:
    """No communication. The other strategies derive from it and override what differs."""

    rank = 0
    world_size = 1
    takes_parts = False
    gathers = False
    casts_on_gathering = False
    keeps_gradients = False
    """Whether a step zeroes gradients in place; else their memory is freed."""
    optimizer: torch.optim.Optimizer

    def __init__(self, parallel: ParallelConfig, precision: Precision) -> None:
        self.parallel, self.precision = parallel, precision
        settle()
        self.device = local_device(parallel)
        widen_where_slow(self.device, getattr(torch, precision))
        self.parameters: dict[str, nn.Parameter] = {}
        self.steps = 0

    def prepare(self, model: nn.Module, optimizer_of: OptimizerOf) -> nn.Module:
        wrapped = self.lay_out(model)
        self.parameters = trained_parameters(model)
        self.optimizer = optimizer_of(self.parameters)
        return wrapped

    def lay_out(self, model: nn.Module) -> nn.Module:
        """Move the model to the device."""
        return model.to(self.device)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Autograd adds gradients up."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float, max_norm: float | None) -> float:
        """A gradient that is not finite changes no weight."""
        limit = math.inf if max_norm is None else max_norm
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
            if self.steps < group.get("waits", 0):
                for parameter in group["params"]:
                    parameter.grad = None  # no update, no decay, no moments
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        self.steps += 1
        return float(norm)

    def start_from(self, step: int) -> None:
        self.steps = step
        for group in self.optimizer.param_groups:
            taken = float(max(0, step - group.get("waits", 0)))
            for parameter in group["params"]:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(taken, device=parameter.device),
                    **{moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS},
                }

    def loaded(self) -> None:
        """The parts are the weights themselves, so that nothing is left to do."""

    def parts(self, name: str) -> dict[str, Part]:
        parameter = self.parameters[name]
        state = self.optimizer.state[parameter]
        # A weight that got no gradient yet, such as one of an unused tower, has no moments.
        moments = {
            m: state[m] if m in state else torch.zeros_like(parameter.detach()) for m in MOMENTS
        }
        return {key: self.part(name, t) for key, t in {"": parameter.detach(), **moments}.items()}

    def part(self, name: str, tensor: Tensor) -> Part:
        """The whole tensor."""
        return Part(tuple(tensor.shape), 0, tensor.view(-1))

    def sum(self, values: Tensor) -> Tensor:
        """One rank has the sum."""
        return values

    def from_rank0(self, value: T) -> T:
        """One rank has the value."""
        return value

    def side_channel(self) -> SideChannel:
        return Alone()

    @staticmethod
    def memory(shape: Shape, parallel: ParallelConfig) -> Held:
        """A whole copy of everything; workers share the writing of checkpoints."""
        trained = shape.trained * shape.master
        return Held(
            parameters=held_bytes(shape, shape.weights),
            gradients=trained,
            between_passes=trained,
            optimizer=len(MOMENTS) * trained,
            buffers=0,
            gathered=0,
            stepping=0,
            stepped=trained,
            snapshot=(1 + len(MOMENTS)) * trained // parallel.max_workers,
        )

    @staticmethod
    def traffic(shape: Shape, parallel: ParallelConfig, micro_batches: int) -> Traffic:
        """No messages."""
        return Traffic()


class Grouped(Single):
    """One rank of the default process group."""

    def __init__(self, parallel: ParallelConfig, precision: Precision) -> None:
        super().__init__(parallel, precision)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def from_rank0(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def side_channel(self) -> SideChannel:
        return Group()
