"""Bottleneck adapters: a small residual layer on the output of a sublayer (arXiv 1902.00751).

For the output h of attention or of the MLP, before it is added to the residual stream:
h + up(activation(down(h))). `up` begins as 0, so that training begins from the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytune_ft.config.methods import AdapterMethod
from raytune_ft.errors import ModelError
from raytune_ft.model.methods.base import Implementation
from raytune_ft.model.methods.hooks import (
    Attached,
    Read,
    base_name,
    chosen_blocks,
    first_of,
    width_of,
    with_first,
)

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
# Names of the sublayers of a block in models of transformers.
_SUBLAYERS = {
    "attention": ("self_attn", "attn", "self_attention", "attention"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "fc2"),
}


def apply_adapter(base: nn.Module, method: AdapterMethod) -> nn.Module:
    """Freeze the base and put a bottleneck behind sublayers of its blocks.

    Raises:
        ModelError: the model has no such block, or a block no such sublayer.
    """
    base.requires_grad_(False)
    Adapter(base, method)
    return base


class Bottleneck(nn.Module):
    """Down projection, activation, up projection, and a residual connection around them."""

    def __init__(self, hidden: int, method: AdapterMethod) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, method.bottleneck)
        self.up = nn.Linear(method.bottleneck, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.activation = _FUNCTIONS[method.activation]
        self.dropout = nn.Dropout(method.dropout)

    def forward(self, states_BSH: Tensor) -> Tensor:
        """Without autocast, products are computed in the dtype of the weights."""
        narrow = torch.is_autocast_enabled(states_BSH.device.type)
        states = states_BSH if narrow else states_BSH.to(self.down.weight.dtype)
        added: Tensor = self.up(self.dropout(self.activation(self.down(states))))
        return states_BSH + added.to(states_BSH.dtype)


class Adapter(Attached):
    """The bottlenecks of one model, by the names of the sublayers that they follow."""

    def __init__(self, model: nn.Module, method: AdapterMethod) -> None:
        super().__init__(model)
        self._method, self._model, self._base = method, model, base_name(model)
        self._blocks = chosen_blocks(model, method.layers)
        wanted = ("attention", "mlp") if method.after == "both" else (method.after,)
        self._modules = [
            f"{name}.{_sublayer(model, block, kind)}"
            for name, block in self._blocks.values()
            for kind in wanted
        ]
        for name in self._modules:
            sublayer = model.get_submodule(name)
            bottleneck = Bottleneck(width_of(model), method)
            bottleneck.train()  # dropout is the only noise; 0 by default
            sublayer.add_module("adapter", bottleneck)
            sublayer.register_forward_hook(self._adapt)

    def _adapt(self, sublayer: nn.Module, arguments: Any, output: Any) -> Any:
        if not self.enabled:
            return output
        bottleneck: Any = sublayer.adapter
        return with_first(output, bottleneck(first_of(output)))

    def contents(self, read: Read) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = {
            **self._method.model_dump(exclude={"name", "dropout"}),
            "method": "adapter",
            "base_model_name_or_path": self._base,
            "layers": list(self._blocks),
            "modules": self._modules,
        }
        return config, {name: read(own) for own, name in self._names()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        for own, name in self._names():
            self._model.get_parameter(own).copy_(tensors[name])

    def _names(self) -> list[tuple[str, str]]:
        """Pairs of a weight's name in the model and in the file."""
        parts = [f"{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")]
        return [(f"{m}.adapter.{part}", f"{m}.{part}") for m in self._modules for part in parts]


def _sublayer(model: nn.Module, block: nn.Module, kind: str) -> str:
    children = dict(block.named_children())
    found = next((name for name in _SUBLAYERS[kind] if name in children), None)
    if found is None:
        others = [one for one, names in _SUBLAYERS.items() if set(names) & children.keys()]
        raise ModelError(
            "method.name=adapter",
            f"finds no sublayer for {kind} in the blocks of this {type(model).__name__}, which "
            f"have {', '.join(children)}",
            f"write method.after: {others[0]}" if others else "write lora or loreft",
        )
    return found


def _restore(base: nn.Module, written: Mapping[str, Any]) -> None:
    own = {key: written[key] for key in ("bottleneck", "after", "activation", "layers")}
    apply_adapter(base, AdapterMethod(name="adapter", **own))


ADAPTER = Implementation(apply_adapter, restore=_restore)
