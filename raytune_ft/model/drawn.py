"""The adapter of one slot as PEFT itself draws it, beside a base that has shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from raytune_ft.config.methods import LoraMethod
from raytune_ft.errors import ConfigError
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
