"""Which weights move: one function per method, one dict entry."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftModel
from torch import nn

from raytune_ft.model.methods.freeze import apply_freeze, freeze_paces
from raytune_ft.model.methods.full import apply_full
from raytune_ft.model.methods.lora import apply_lora, leave_casts_to_autocast, lora_paces
from raytune_ft.model.methods.pace import Pace
from raytune_ft.model.methods.vectors import apply_ia3, apply_oft, apply_vera

__all__ = [
    "METHODS",
    "PACES",
    "Pace",
    "leave_casts_to_autocast",
    "paces",
    "trained_parameters",
    "without_method",
]

METHODS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "full": apply_full,
    "freeze": apply_freeze,
    "lora": apply_lora,
    "qlora": apply_lora,  # on a base that was read in 4 bits
    "ia3": apply_ia3,
    "vera": apply_vera,
    "oft": apply_oft,
}

PACES: dict[str, Callable[[nn.Module, Any], dict[str, Pace]]] = {
    "freeze": freeze_paces,
    "lora": lora_paces,
    "qlora": lora_paces,
}


def paces(model: nn.Module, method: Any) -> dict[str, Pace]:
    """The trained weights that have a rate or a beginning of their own."""
    return PACES[method.name](model, method) if method.name in PACES else {}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, under the names that the unwrapped model gives."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def without_method(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, an adapted model computes what its base does.

    A fully trained model has no base beside it: there the base is the model before its first step.
    """
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
