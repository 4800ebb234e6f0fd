"""Many LoRA adapters (arXiv 2106.09685) on one frozen base, in one pass.

Shapes: K slots, G of them in a pass, N numbers of one adapter, R the largest rank, I inputs and O
outputs of a layer, B rows and S tokens of a pass, T = B / G * S tokens of each slot. Rows are
grouped by slot.

A slot with a rank below R, or without an adapter on a layer, has zeros there. They stay zero,
since the gradient of A is a product with B and that of B one with A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from raytune_ft.config.methods import LoraMethod
from raytune_ft.errors import ConfigError, ModelError
from raytune_ft.model.load import Precision
from raytune_ft.model.meta import apply_beside_shapes
from raytune_ft.model.methods import trained_parameters

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class DrawnLayer:
    """Names in PEFT of the weights `A_RI` and `B_OR` of an adapted layer."""

    a: str
    b: str


@dataclass(frozen=True)
class Drawn:
    """An adapter before its first step. `layers` goes by names in the base."""

    model: nn.Module
    weights: dict[str, Tensor]
    layers: dict[str, DrawnLayer]
    rank: int
    scale: float


def draw_adapter(shapes: nn.Module, method: LoraMethod, precision: Precision, seed: int) -> Drawn:
    """Bit for bit what `build_model` draws; `shapes` comes from `shapes_of` and stays as it is.

    Raises:
        ModelError: see `apply_lora`.
        ConfigError: an adapted layer is none that slots can share.
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
                f"is a {kind} that trials in one process cannot share",
                "write search.execution: isolated, or other targets",
            )
        layers[name] = DrawnLayer(f"{path}.lora_A.default.weight", f"{path}.lora_B.default.weight")
        scale = float(module.scaling["default"])
    weights = {name: weight.detach() for name, weight in trained_parameters(model).items()}
    assert set(weights) == {name for layer in layers.values() for name in (layer.a, layer.b)}
    return Drawn(model, weights, layers, method.rank, scale)


@dataclass(frozen=True)
class Place:
    """Where `A_RI`, and after it `B_RO`, of a layer stand in the N numbers of an adapter."""

    start: int
    rank: int
    inputs: int
    outputs: int

    @property
    def stop(self) -> int:
        """The first number that is another layer's."""
        return self.start + self.rank * (self.inputs + self.outputs)

    def pair(self, numbers_GN: Tensor) -> tuple[Tensor, Tensor]:
        """Views: `A_GRI` and `B_GRO`."""
        middle = self.start + self.rank * self.inputs
        a_GRI = numbers_GN[:, self.start : middle].unflatten(1, (self.rank, self.inputs))
        b_GRO = numbers_GN[:, middle : self.stop].unflatten(1, (self.rank, self.outputs))
        return a_GRI, b_GRO


class Window:
    """The adapters of a pass, g-th adapter for the g-th group of rows, as every layer sees them.

    Made once for many passes: views of `numbers_GN` and `gradients_GN`, to which a backward adds;
    None where nothing is trained. No adapter here has a higher rank than `rank`.
    """

    def __init__(
        self,
        places: Mapping[str, Place],
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
        self.adapters = _cut(places, self._computed_GN, rank)
        self.gradients = None if gradients_GN is None else _cut(places, gradients_GN, rank)
        if gradients_GN is not None:
            for a_GRI, _ in self.adapters:
                a_GRI.requires_grad_()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute with the numbers as they are now."""
        if self._computed_GN.dtype != self._masters_GN.dtype:
            self._computed_GN.copy_(self._masters_GN)


def _cut(places: Mapping[str, Place], numbers_GN: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    pairs = [place.pair(numbers_GN.detach()) for place in places.values()]
    return [(a_GRI[:, :rank], b_GRO[:, :rank]) for a_GRI, b_GRO in pairs]


class MultiLora:
    """The layers of a model that some slot adapts, and where their numbers stand."""

    def __init__(self, model: nn.Module, rank: int, in_place: bool) -> None:
        """`in_place`: nobody keeps the base's output to use it a second time."""
        self.model, self.rank, self.in_place = model, rank, in_place
        self.places: dict[str, Place] = {}
        self.window: Window | None = None
        self.tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        self.tokens = named["input_ids"].numel()

    @property
    def numbers(self) -> int:
        """N."""
        return max((place.stop for place in self.places.values()), default=0)

    def adapt(self, names: list[str]) -> None:
        """Put a layer that adds adapters around each of these; N grows, what was there stays."""
        for name in names:
            if name in self.places:
                continue
            layer = StackedLinear(self.model.get_submodule(name), self, len(self.places), name)
            self.places[name] = Place(self.numbers, self.rank, layer.inputs, layer.outputs)
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer)

    @contextmanager
    def applied(self, window: Window) -> Iterator[None]:
        """Inside, forward and backward of the model go through the window's adapters."""
        window.refresh()
        self.window = window
        try:
            yield
        finally:
            self.window = None


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
        """GPT-2's Conv1D holds it the other way round."""
        weight: Tensor = self.base_layer.weight
        return weight.t() if self._transposed else weight

    @property
    def weight(self) -> Tensor:
        """Some models look at it."""
        weight: Tensor = self.base_layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Raises ModelError where the layer is not given every token of every row."""
        window = self._stack.window
        if window is None:
            output: Tensor = self.base_layer(x)
            return output
        if x.numel() != self._stack.tokens * self.inputs:
            raise ModelError(
                f"method.targets: {self._name}",
                "sees some tokens only, so that adapters cannot be told apart by rows",
                "write search.execution: isolated, or other targets",
            )
        a_GRI, b_GRO = window.adapters[self._index]
        da_GRI, db_GRO = window.gradients[self._index] if window.gradients else (None, None)
        bias = self.base_layer.bias
        y_GTO: Tensor = _LinearWithAdapters.apply(
            x.reshape(window.groups, -1, self.inputs).to(a_GRI.dtype),
            self.weight_OI.to(a_GRI.dtype),
            None if bias is None else bias.to(a_GRI.dtype),
            a_GRI,
            b_GRO,
            window.scales_G11,
            da_GRI,
            db_GRO,
            self._stack.in_place,
        )
        return y_GTO.reshape(*x.shape[:-1], self.outputs)


class _LinearWithAdapters(torch.autograd.Function):
    """`x W^T + bias + scale (x A^T) B`; the gradients of A and B are added where they belong."""

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
        # Not baddbmm: into views with gaps between the slots it goes slot by slot.
        da_GRI += torch.bmm(dh_GTR.mT, x_GTI)
        db_GRO += torch.bmm(h_GTR.mT, dy_GTO)
        dx_GTI = None
        if ctx.needs_input_grad[0]:
            dx_GTI = torch.matmul(dy_GTO, weight_OI).baddbmm_(dh_GTR, a_GRI)
        return dx_GTI, *[None] * 8
