"""How a base computes in the precision of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def set_up(base: nn.Module, precision: str) -> None:
    """Ready to compute in it, without noise; the weights may be on the meta device."""
    base.eval()
    if precision == "float64":  # for which the fused products of experts have no kernel
        base.set_experts_implementation("eager")  # type: ignore[operator]
    if precision == "bfloat16":
        _embed_in_bfloat16(base)


def _embed_in_bfloat16(model: nn.Module) -> None:
    """The residual stream begins in bfloat16, whether embeddings are held in it, cast to it by a
    strategy, or kept in float32, which autocast leaves alone.
    """

    def narrow(module: nn.Module, arguments: Any, output: Any) -> Any:
        return output.to(torch.bfloat16) if isinstance(output, torch.Tensor) else output

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(narrow)
