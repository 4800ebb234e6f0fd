"""Experts of a mixture that lie in one tensor for each product, `[experts, outputs, inputs]`."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

GROUPED = "grouped_mm"


def grouped_in_autocast(self: nn.Module, hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """transformers' grouped products, in the dtype of autocast where it is on.

    Autocast does not know these products, and transformers gives them the dtype of the weights:
    trained ones in float32 would be multiplied one expert after another, with other numbers than
    under a strategy that gathers them in bfloat16.
    """
    wide: dict[str, Any] = {}
    if torch.is_autocast_enabled(hidden.device.type):
        wide = {
            name: weight
            for name, weight in self._parameters.items()
            if weight is not None and weight.dtype == torch.float32
        }
    dtype = torch.get_autocast_dtype(hidden.device.type) if wide else None
    held: dict[str, Any] = self._parameters
    try:
        held.update({name: weight.to(dtype) for name, weight in wide.items()})
        found: Tensor = grouped_mm_experts_forward(self, hidden, *arguments, **named)
    finally:
        held.update(wide)
    return found


def multiply_in_autocast() -> None:
    """Let every model of this process compute fused experts so."""
    ExpertsInterface.register(GROUPED, grouped_in_autocast)


def expert_notes(model: nn.Module) -> tuple[str, ...]:
    """What `plan` and a run say of fused experts that adapters do not reach."""
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return ()
    fused = [
        weight
        for module in model.modules()
        if hasattr(module, "num_experts")
        for weight in module._parameters.values()
        if weight is not None and weight.ndim == 3 and not weight.requires_grad
    ]
    if not fused:
        return ()
    share = sum(weight.numel() for weight in fused) / sum(p.numel() for p in model.parameters())
    return (
        f"no adapter reaches the experts ({share:.0%} of the weights), which are fused in "
        f"{len(fused)} tensors; they stay as they are",
    )
