"""Which weights move: one function per method, one dict entry."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from raytune_ft.model.methods.adapter import apply_adapter
from raytune_ft.model.methods.attached import Read, attached
from raytune_ft.model.methods.full import apply_full
from raytune_ft.model.methods.lora import apply_lora, leave_casts_to_autocast
from raytune_ft.model.methods.loreft import apply_loreft
from raytune_ft.model.methods.prefix import apply_prefix
from raytune_ft.model.methods.virtual import apply_p_tuning, apply_prompt

__all__ = [
    "METHODS",
    "adapter_writer",
    "leave_casts_to_autocast",
    "trained_parameters",
    "without_method",
]

METHODS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "full": apply_full,
    "lora": apply_lora,
    "loreft": apply_loreft,
    "adapter": apply_adapter,
    "prompt": apply_prompt,
    "p_tuning": apply_p_tuning,
    "prefix": apply_prefix,
}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, under the names that the unwrapped model gives."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def without_method(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, an adapted model computes what its base does.

    A fully trained model has no base beside it: there the base is the model before its first step.
    """
    found = attached(model)
    if found is not None:
        return found.disabled()
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def adapter_writer(model: nn.Module) -> Callable[[Read, Path], None] | None:
    """Writes the trained weights as an adapter, in files of its own; None for a whole model."""
    found = attached(model)
    if found is not None:
        return found.save
    if not isinstance(model, PeftModel):
        return None
    names = list(trained_parameters(model))

    def write(read: Read, directory: Path) -> None:
        # "auto" would ask the hub whether the embeddings were resized.
        model.save_pretrained(
            str(directory),
            state_dict={name: read(name) for name in names},
            save_embedding_layers=False,
        )

    return write
