"""Many LoRA adapters (arXiv 2106.09685) on one frozen base, in one pass.

Shapes: K slots, G of them in a pass, N numbers of one adapter, R the largest rank, I inputs and O
outputs of a layer, B rows and S tokens of a pass, T = B / G * S tokens of each slot. Rows are
grouped by slot.

A slot with a rank below R, or without an adapter on a layer, has zeros there. They stay zero,
since the gradient of A is a product with B and that of B one with A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from raytune_ft.config.methods import LoraMethod
from raytune_ft.errors import ConfigError, ModelError
from raytune_ft.model.export import Exporter
from raytune_ft.model.load import Precision
from raytune_ft.model.meta import apply_beside_shapes
from raytune_ft.model.methods import trained_parameters

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraNames:
    """PEFT's names of the weights `A_RI` and `B_OR` of an adapted layer."""

    a: str
    b: str


@dataclass(frozen=True)
class AdapterInit:
    """An adapter before its first step. The keys of `layers` are names of layers of the base;
    `exporter` writes what it has learnt.
    """

    exporter: Exporter
    weights: dict[str, Tensor]
    layers: dict[str, LoraNames]
    rank: int
    scale: float


def init_adapter(
    shapes: nn.Module, method: LoraMethod, precision: Precision, seed: int
) -> AdapterInit:
    """The adapter that `build_model` would draw, bit for bit; `shapes` is not changed.

    Raises:
        ModelError: see `apply_lora`.
        ConfigError: slots cannot share an adapted layer.
    """
    model = apply_beside_shapes(shapes, method, precision, seed)
    head = shapes.get_output_embeddings()  # type: ignore[operator]
    layers = {}
    scale = 1.0
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = path.removeprefix(_PREFIX)
        kind = type(module.get_base_layer()).__name__
        if kind not in ("Linear", "Conv1D") or shapes.get_submodule(name) is head:
            raise ConfigError(
                f"method.targets: {name}",
                f"is a {kind}, which packed trials cannot share",
                "write search.execution: isolated, or other targets",
            )
        layers[name] = LoraNames(f"{path}.lora_A.default.weight", f"{path}.lora_B.default.weight")
        scale = float(module.scaling["default"])
    weights = {name: weight.detach() for name, weight in trained_parameters(model).items()}
    assert set(weights) == {name for layer in layers.values() for name in (layer.a, layer.b)}
    return AdapterInit(Exporter(model, torch.float32), weights, layers, method.rank, scale)


@dataclass(frozen=True)
class LayerSlice:
    """The slice of an adapter's N numbers that holds a layer's `A_RI` and, after it, its `B_RO`."""

    start: int
    rank: int
    inputs: int
    outputs: int

    @property
    def stop(self) -> int:
        """The end of the slice."""
        return self.start + self.rank * (self.inputs + self.outputs)

    def pair(self, numbers_GN: Tensor) -> tuple[Tensor, Tensor]:
        """Views: `A_GRI` and `B_GRO`."""
        middle = self.start + self.rank * self.inputs
        a_GRI = numbers_GN[:, self.start : middle].unflatten(1, (self.rank, self.inputs))
        b_GRO = numbers_GN[:, middle : self.stop].unflatten(1, (self.rank, self.outputs))
        return a_GRI, b_GRO


class ActiveAdapters:
    """The adapters of a pass as the layers see them: the g-th one for the g-th group of rows.

    Views of `numbers_GN` and of `gradients_GN` (None in an evaluation), to which a backward adds;
    built once for many passes. `rank` is the largest rank among them.
    """

    def __init__(
        self,
        slices: Mapping[str, LayerSlice],
        numbers_GN: Tensor,
        gradients_GN: Tensor | None,
        scales_G: Tensor,
        rank: int,
        dtype: torch.dtype,
    ) -> None:
        self.groups = len(numbers_GN)
        self.scales_G11 = scales_G.view(-1, 1, 1)
        self._masters_GN = numbers_GN
        self._computed_GN = numbers_GN.to(dtype)
        self.adapters = _cut(slices, self._computed_GN, rank)
        self.gradients = None if gradients_GN is None else _cut(slices, gradients_GN, rank)
        if gradients_GN is not None:
            for a_GRI, _ in self.adapters:
                a_GRI.requires_grad_()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the master numbers, as they are now, into those that are computed with."""
        if self._computed_GN.dtype != self._masters_GN.dtype:
            self._computed_GN.copy_(self._masters_GN)


def _cut(
    places: Mapping[str, LayerSlice], numbers_GN: Tensor, rank: int
) -> list[tuple[Tensor, Tensor]]:
    pairs = [place.pair(numbers_GN.detach()) for place in places.values()]
    return [(a_GRI[:, :rank], b_GRO[:, :rank]) for a_GRI, b_GRO in pairs]


class MultiLora:
    """The layers of a model that a slot adapts, and the slices of their numbers."""

    def __init__(self, model: nn.Module, rank: int, in_place: bool) -> None:
        """`in_place`: the base layer's output may be overwritten."""
        self.model, self.rank, self.in_place = model, rank, in_place
        self.slices: dict[str, LayerSlice] = {}
        self.active: ActiveAdapters | None = None
        self.tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        self.tokens = named["input_ids"].numel()

    @property
    def numbers(self) -> int:
        """N, the length of an adapter."""
        return max((each.stop for each in self.slices.values()), default=0)

    def adapt(self, names: list[str]) -> None:
        """Wrap each of these layers in a `StackedLinear`; N grows, earlier slices stay."""
        for name in names:
            if name in self.slices:
                continue
            layer = StackedLinear(self.model.get_submodule(name), self, len(self.slices), name)
            self.slices[name] = LayerSlice(self.numbers, self.rank, layer.inputs, layer.outputs)
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer)

    @contextmanager
    def applied(self, active: ActiveAdapters) -> Iterator[None]:
        """In the context, forward and backward of the model use these adapters."""
        active.refresh()
        with self._with(active):
            yield

    def bare(self) -> AbstractContextManager[None]:
        """A context in which the model computes what the base does."""
        return self._with(None)

    @contextmanager
    def _with(self, active: ActiveAdapters | None) -> Iterator[None]:
        before, self.active = self.active, active
        try:
            yield
        finally:
            self.active = before


class StackedLinear(nn.Module):
    """A frozen linear layer and one adapter for each group of rows."""

    def __init__(self, base_layer: Any, stack: MultiLora, index: int, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._stack, self._index, self._name = stack, index, name
        self._transposed = not isinstance(base_layer, nn.Linear)
        self.outputs, self.inputs = self.weight_OI.shape

    @property
    def weight_OI(self) -> Tensor:
        """The weight; GPT-2's Conv1D stores its transpose."""
        weight: Tensor = self.base_layer.weight
        return weight.t() if self._transposed else weight

    @property
    def weight(self) -> Tensor:
        """The base's weight, which the code of some models reads."""
        weight: Tensor = self.base_layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Raises ModelError where the layer is not given every token of every row."""
        active = self._stack.active
        if active is None:
            output: Tensor = self.base_layer(x)
            return output
        if x.numel() != self._stack.tokens * self.inputs:
            raise ModelError(
                f"method.targets: {self._name}",
                "gets only some tokens of a row, so packed trials cannot share it",
                "write search.execution: isolated, or other targets",
            )
        a_GRI, b_GRO = active.adapters[self._index]
        da_GRI, db_GRO = active.gradients[self._index] if active.gradients else (None, None)
        bias = self.base_layer.bias
        y_GTO: Tensor = _LinearWithAdapters.apply(
            x.reshape(active.groups, -1, self.inputs).to(a_GRI.dtype),
            self.weight_OI.to(a_GRI.dtype),
            None if bias is None else bias.to(a_GRI.dtype),
            a_GRI,
            b_GRO,
            active.scales_G11,
            da_GRI,
            db_GRO,
            self._stack.in_place,
        )
        return y_GTO.reshape(*x.shape[:-1], self.outputs)


class _LinearWithAdapters(torch.autograd.Function):
    """`x W^T + bias + scale (x A^T) B`; backward adds to the slots' gradients of A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x_GTI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_GRI: Tensor,
        b_GRO: Tensor,
        scales_G11: Tensor,
        da_GRI: Tensor | None,
        db_GRO: Tensor | None,
        in_place: bool,
    ) -> Tensor:
        y_GTO = F.linear(x_GTI, weight_OI, bias_O)
        h_GTR = torch.bmm(x_GTI, a_GRI.mT).mul_(scales_G11)
        ctx.save_for_backward(x_GTI, weight_OI, a_GRI, b_GRO, scales_G11, h_GTR)
        ctx.gradients = da_GRI, db_GRO
        return y_GTO.baddbmm_(h_GTR, b_GRO) if in_place else y_GTO.baddbmm(h_GTR, b_GRO)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy_GTO,) = outputs
        x_GTI, weight_OI, a_GRI, b_GRO, scales_G11, h_GTR = ctx.saved_tensors
        da_GRI, db_GRO = ctx.gradients
        dh_GTR = torch.bmm(dy_GTO, b_GRO.mT).mul_(scales_G11)
        # Not baddbmm: on views with gaps between the slots it loops over slots.
        da_GRI += torch.bmm(dh_GTR.mT, x_GTI)
        db_GRO += torch.bmm(h_GTR.mT, dy_GTO)
        dx_GTI = None
        if ctx.needs_input_grad[0]:
            dx_GTI = torch.matmul(dy_GTO, weight_OI).baddbmm_(dh_GTR, a_GRI)
        return dx_GTI, *[None] * 8
