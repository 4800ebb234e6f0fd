"""LoRA that begins with a part of the weights (PiSSA, arXiv 2404.02948; OLoRA, 2406.01775).

Both set A and B to a part of a weight W and subtract that part from W: the trained weight is
W - s B0 A0 + s B A, with s = alpha / rank. Here the base stays as it is and s B0 A0 is subtracted
from the output of the layer instead. So the model begins as its base up to rounding, a base in
bfloat16 is not rounded again, and the model without the adapter is the base. A checkpoint holds A
and B; B0 and A0 are computed from the base again. The exported adapter is a plain LoRA of twice the
rank on the original base, with A above A0 and B beside -B0.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import peft.tuners.lora.layer as lora_layer
import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from raytune_ft.errors import ModelError

_NAME = "default"
_A, _B = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"


def begin_with_the_weights(model: nn.Module, init: str) -> None:
    """Set every A and B as PEFT does for `init`, and keep the initial values beside them.

    Raises:
        ModelError: an adapted layer is not linear, or smaller than the rank of its adapter.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        rank, shape = layer.r.get(_NAME, 0), (layer.in_features, layer.out_features)
        if type(layer) is not Linear:
            raise ModelError(
                f"method.init={init}",
                f"needs linear layers, and {name} is not one",
                "write method.init: default, or name linear layers in method.targets",
            )
        if rank > min(shape):
            raise ModelError(
                f"method.rank={rank}",
                f"is larger than the weight of {name}, which is {shape[1]} x {shape[0]}",
                f"write at most {min(shape)}, or method.init: default",
            )
        _draw(layer, init)
        layer.start_A = _kept(layer.lora_A[_NAME].weight)
        layer.start_B = _kept(layer.lora_B[_NAME].weight)
        layer.register_forward_hook(_take_out)


def _draw(layer: Any, init: str) -> None:
    """Call PEFT's initialisation, which needs float32 and changes W; W is restored."""
    weight = layer.get_base_layer().weight
    a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    dtype = a.dtype
    with lora_layer.gather_params_ctx(weight):
        if weight.is_meta:  # only shapes are needed
            return
        held, transposed = weight.data, init == "olora" and layer.fan_in_fan_out
        try:
            weight.data = (held.T if transposed else held).float().clone()
            if init == "olora":
                layer.olora_init(_NAME)
            else:
                layer.pissa_init(_NAME, init)
        finally:
            weight.data = held
    a.data, b.data = a.data.to(dtype), b.data.to(dtype).contiguous()


def _kept(weight: Tensor) -> nn.Linear:
    """A frozen copy as a linear layer, which strategies gather like other layers."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return layer


def _take_out(layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if layer.disable_adapters:
        return output
    x = layer._cast_input_dtype(arguments[0], layer.start_A.weight.dtype)
    taken: Tensor = layer.start_B(layer.start_A(x)) * layer.scaling[_NAME]
    return (output - taken).to(output.dtype)


class PlainLora:
    """Converts an adapter to a plain LoRA; made before a strategy lays the model out."""

    def __init__(self, model: nn.Module) -> None:
        self._starts = {name: weight.detach().cpu().clone() for name, weight in _starts(model)}

    def weights(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Trained weights, with the initial ones appended where these are subtracted."""
        found = dict(trained)
        for name, start in self._starts.items():
            weight = found[name]
            start = start.to(weight)
            both = (weight, start) if name.endswith(_A) else (weight, -start)
            found[name] = torch.cat(both, 0 if name.endswith(_A) else 1)
        return found

    def config(self, written: Any) -> Any:
        """PEFT's keys, with twice the rank and the same scale where weights are appended."""
        if not self._starts:
            return written
        config = copy.deepcopy(written)
        louder = 2**0.5 if config.use_rslora else 2.0
        config.r, config.lora_alpha = 2 * config.r, louder * config.lora_alpha
        config.rank_pattern = {key: 2 * r for key, r in config.rank_pattern.items()}
        config.alpha_pattern = {key: louder * a for key, a in config.alpha_pattern.items()}
        return config


def _starts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and hasattr(layer, "start_A"):
            yield name + _A, layer.start_A.weight
            yield name + _B, layer.start_B.weight
