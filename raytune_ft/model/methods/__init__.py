"""Which weights move: one function per method, one dict entry."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftModel
from torch import nn

from raytune_ft.model.methods.full import apply_full
from raytune_ft.model.methods.lora import apply_lora, leave_casts_to_autocast

__all__ = ["METHODS", "leave_casts_to_autocast", "trained_parameters", "without_method"]

METHODS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "full": apply_full,
    "lora": apply_lora,
}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, under the names that the unwrapped model gives."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def without_method(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, an adapted model computes what its base does.

    A fully trained model has no base beside it: there the base is the model before its first step.
    """
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
