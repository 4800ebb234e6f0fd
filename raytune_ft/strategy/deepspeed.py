"""Moments, gradients and weights sharded over ranks, optionally in host memory (DeepSpeed ZeRO)."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raytune_ft.config import deepspeed_json
from raytune_ft.config.schema import ParallelConfig
from raytune_ft.model.load import Precision
from raytune_ft.model.methods import trained_parameters
from raytune_ft.model.probe import unreached
from raytune_ft.strategy.base import MOMENTS, Held, Message, OptimizerOf, Shape, Traffic, held_bytes
from raytune_ft.strategy.single import Grouped
from raytune_ft.tensors.write import Part


@dataclass(frozen=True)
class Range:
    """Elements of a parameter, from `start` on, lie in `flat` between `low` and `high`."""

    start: int
    flat: Tensor
    low: int
    high: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same elements of a tensor laid out as `flat` is, such as a moment."""
        return tensor.detach()[self.low : self.high]


class Zero(Protocol):
    """Where the stages of ZeRO keep master weights."""

    def flats(self) -> Iterable[Tensor]:
        """The tensors that Adam steps on this rank."""

    def range_of(self, parameter: nn.Parameter) -> Range:
        """What this rank holds of a parameter, without padding; may be empty."""

    def refresh(self) -> None:
        """Copy master weights to the weights of the forward pass; every rank must call this."""


class Zero12:
    """Stages 1 and 2: whole weights on every rank, master weights and moments cut in slices.

    A group's parameters lie end to end, with gaps for alignment. Every rank has a slice of the same
    length, and the last one ends in padding.
    """

    def __init__(self, optimizer: Any, rank: int) -> None:
        self._optimizer = optimizer
        self._ranges: dict[nn.Parameter, Range] = {}
        groups = zip(
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.partition_size,
            self.flats(),
            strict=True,
        )
        for parameters, offsets, size, flat in groups:
            left = rank * size
            for parameter, offset in zip(parameters, offsets, strict=True):
                low = min(max(offset, left), left + size)
                high = max(low, min(offset + parameter.numel(), left + size))
                start = low - offset if high > low else 0
                self._ranges[parameter] = Range(start, flat, low - left, high - left)

    def flats(self) -> Iterable[Tensor]:
        flats: list[Tensor] = self._optimizer.single_partition_of_fp32_groups
        return flats

    def range_of(self, parameter: nn.Parameter) -> Range:
        return self._ranges[parameter]

    def refresh(self) -> None:
        self._optimizer.update_lp_params()


class Zero3:
    """Stage 3: each rank has one slice of every parameter; the last ones end in padding."""

    def __init__(self, optimizer: Any, rank: int) -> None:
        self._optimizer, self._rank = optimizer, rank

    def flats(self) -> Iterable[Tensor]:
        flats: list[Tensor] = self._optimizer.fp32_partitioned_groups_flat
        return flats

    def range_of(self, parameter: nn.Parameter) -> Range:
        whole: int = parameter.ds_numel  # type: ignore[attr-defined]
        place = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        group, low, size = place
        start = min(self._rank * size, whole)
        flat = self._optimizer.fp32_partitioned_groups_flat[group]
        return Range(start, flat, low, low + min(size, whole - start))

    @torch.no_grad()
    def refresh(self) -> None:
        """Do what the end of a step does; gathered weights of a forward pass are dropped."""
        optimizer = self._optimizer
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


# Elements of DeepSpeed's communication buffers; its default is ten times as many.
BUCKET = 50_000_000
# DeepSpeed's default for the elements that stay gathered under stage 3.
LIVE_ELEMENTS = 1_000_000_000


class DeepSpeed(Grouped):
    """DeepSpeed's engine around our AdamW.

    Trained weights are float32 and matrix products go through autocast, as with every other
    strategy. DeepSpeed's own bf16 mode, which also keeps weights and norms in bfloat16, is off.
    """

    gathers = True
    zero: Zero

    def prepare(self, model: nn.Module, optimizer_of: OptimizerOf) -> nn.Module:
        """The optimizer is built first, while parameters still have their shapes."""
        self.parameters = trained_parameters(model)
        self.shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        self.optimizer = optimizer_of(self.parameters)
        self._exempt_unused_from_decay(model)
        config = engine_config(self.parallel, self.precision, self.world_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            deepspeed = _import_deepspeed(self.device)
            deepspeed.init_distributed(dist_init_required=False)  # use the existing group
            if self.parallel.zero_stage == 3:
                self._shard(deepspeed, model, config)
            self.engine: Any = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=config, dist_init_required=False
            )[0]
        # DeepSpeed calls deprecated functions of torch in every step.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        kind = Zero3 if self.parallel.zero_stage == 3 else Zero12
        self.zero = kind(self.engine.optimizer, self.rank)
        model.register_forward_pre_hook(_forget_casts)
        wrapped: nn.Module = self.engine
        return wrapped

    def _shard(self, deepspeed: Any, model: nn.Module, config: dict[str, Any]) -> None:
        """Shard weight by weight: the engine would first move all of them to the device."""
        deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=torch.float32)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)

    def _exempt_unused_from_decay(self, model: nn.Module) -> None:
        """AdamW skips weights without a gradient; inside DeepSpeed's flat groups it would decay
        them.
        """
        groups = [group for group in self.optimizer.param_groups if group["weight_decay"]]
        idle = self._idle(model) if groups else set()
        for group in groups:
            kept = [p for p in group["params"] if id(p) not in idle]
            rest = [p for p in group["params"] if id(p) in idle]
            if rest:
                group["params"] = kept
                self.optimizer.add_param_group({**group, "params": rest, "weight_decay": 0.0})

    def _idle(self, model: nn.Module) -> set[int]:
        """Ids of unused parameters. Under stage 3 the device may be too small for the model, so
        that it runs on the CPU; where it cannot, as with flash attention, none counts as unused.
        """
        if self.parallel.zero_stage < 3:
            return {id(p) for p in unreached(model.to(self.device), self.device, self.precision)}
        try:
            return {id(p) for p in unreached(model, torch.device("cpu"), self.precision)}
        except (RuntimeError, ValueError):
            return set()

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Scale the loss, since DeepSpeed averages over ranks and a sum is needed."""
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, lr: float, max_norm: float | None) -> float:
        """A gradient that is not finite changes no weight."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        self.engine.optimizer.clip_grad = max_norm or 0.0
        self.engine.step()
        self.steps += 1
        return float(self.engine.get_global_grad_norm())

    def start_from(self, step: int) -> None:
        self.steps = step
        for flat in self.zero.flats():
            self.optimizer.state[flat] = {
                "step": torch.tensor(float(step), device=flat.device),
                **{moment: torch.zeros_like(flat.detach()) for moment in MOMENTS},
            }

    def loaded(self) -> None:
        self.zero.refresh()

    def parts(self, name: str) -> dict[str, Part]:
        found = self.zero.range_of(self.parameters[name])
        state = self.optimizer.state[found.flat]
        values = found.of(found.flat)
        moments = {m: found.of(state[m]) if m in state else values.new_zeros(()) for m in MOMENTS}
        return {
            key: Part(self.shapes[name], found.start, tensor.expand_as(values))
            for key, tensor in {"": values, **moments}.items()
        }

    @staticmethod
    def memory(shape: Shape, parallel: ParallelConfig) -> Held:
        """Flat slices of moments and masters, from stage 2 of gradients, under 3 of weights."""
        workers, stage = parallel.max_workers, parallel.zero_stage
        trained = shape.trained * shape.master
        part = -(-trained // workers)
        whole = held_bytes(shape, shape.weights)
        gathered = 0
        if stage == 3:
            gathered = round(whole * min(1.0, LIVE_ELEMENTS / max(1, shape.total)))
            whole = -(-whole // workers)
        return Held(
            parameters=whole,
            gradients=part,
            between_passes=trained if stage == 1 else part,
            optimizer=(1 + len(MOMENTS)) * part,
            buffers=min(shape.trained, BUCKET) * shape.master,
            gathered=gathered,
            stepping=part,
            stepped=-(-shape.trained // workers) * shape.master,
            snapshot=(1 + len(MOMENTS)) * part,
            keeps_gradients=stage == 3,
        )

    @staticmethod
    def traffic(shape: Shape, parallel: ParallelConfig, micro_batches: int) -> Traffic:
        """Gradients are scattered, in every pass from stage 2 on; weights are gathered after the
        step, under stage 3 for forward and backward of every pass.
        """
        trained, stage = shape.trained * shape.master, parallel.zero_stage
        reduce = Message("reduce-scatter", trained, 1 if stage == 1 else micro_batches)
        if stage < 3:
            return Traffic((reduce, Message("all-gather", trained, 1)))
        blocks = max(1, len(shape.blocks))
        gathered = held_bytes(shape, shape.weights) // blocks
        return Traffic((reduce, Message("all-gather", gathered, 2 * blocks * micro_batches)))


def engine_config(
    parallel: ParallelConfig, precision: Precision, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's own keys, overridden by ours.

    Batch sizes are for its bookkeeping alone: the loop normalises by label tokens.
    """
    own = deepspeed_json.passed_on(parallel.deepspeed) if parallel.deepspeed else {}
    own_zero = own.pop("zero_optimization", {})
    zero = {"reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET // 10} | own_zero
    zero["stage"] = parallel.zero_stage
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    for part, moved in (("optimizer", ("optimizer", "all")), ("param", ("all",))):
        if parallel.offload in moved:
            zero[f"offload_{part}"] = host | zero.get(f"offload_{part}", {}) | {"device": "cpu"}
        else:
            zero.pop(f"offload_{part}", None)
    return own | {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "torch_autocast": {
            "enabled": precision == "bfloat16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # reductions stay in float32
        },
        "zero_optimization": zero,
    }


def _import_deepspeed(device: torch.device) -> Any:
    """The package, without its log output, on the device of this process."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed reads the device from it
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # None of its kernels is used, and the search for compatible ones compiles some.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _forget_casts(*_: object) -> None:
    """Autocast would keep a bfloat16 copy of every gathered weight until the forward ends."""
    torch.set_autocast_cache_enabled(False)
