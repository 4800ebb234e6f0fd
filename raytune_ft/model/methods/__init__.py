"""Which weights move: one function per method, one dict entry."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from raytune_ft.model.methods.bottleneck import apply_adapter
from raytune_ft.model.methods.freeze import Pace, apply_freeze, apply_full, freeze_paces
from raytune_ft.model.methods.hooks import Read, attached
from raytune_ft.model.methods.lora import apply_lora, leave_casts_to_autocast, lora_paces
from raytune_ft.model.methods.loreft import apply_loreft
from raytune_ft.model.methods.peft import apply_ia3, apply_oft, apply_vera
from raytune_ft.model.methods.pissa import PlainLora
from raytune_ft.model.methods.prefix import apply_prefix
from raytune_ft.model.methods.virtual import apply_p_tuning, apply_prompt

__all__ = [
    "METHODS",
    "PACES",
    "Pace",
    "adapter_writer",
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
    "loreft": apply_loreft,
    "adapter": apply_adapter,
    "prompt": apply_prompt,
    "p_tuning": apply_p_tuning,
    "prefix": apply_prefix,
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
    found = attached(model)
    if found is not None:
        return found.disabled()
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def adapter_writer(
    model: nn.Module, saver: nn.Module | None = None
) -> Callable[[Read, Path], None] | None:
    """Writes the trained weights as an adapter, in files of its own; None for a whole model.

    `saver` may be a copy of its shapes: PEFT asks it for everything but the weights.
    """
    found = attached(model)
    if found is not None:
        return found.save
    if not isinstance(model, PeftModel):
        return None
    names, plain, shared = list(trained_parameters(model)), PlainLora(model), _shared_buffers(model)
    asked: Any = model if saver is None else saver
    written = asked.peft_config
    written.update({name: plain.config(each) for name, each in written.items()})

    def write(read: Read, directory: Path) -> None:
        # "auto" would ask the hub whether the embeddings were resized.
        asked.save_pretrained(
            str(directory),
            state_dict=plain.weights({name: read(name) for name in names}) | shared,
            save_embedding_layers=False,
        )

    return write


def _shared_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what an adapter draws once for all layers, such as VeRA's matrices."""
    return {
        name: buffer.cpu().clone()
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name.startswith("base_model.") and not name.startswith("base_model.model.")
    }
