"""Which weights move: one function per method, one dict entry."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from raytune_ft.config.schema import LoraMethod
from raytune_ft.errors import ModelError


def apply_full(base: nn.Module, method: Any) -> nn.Module:
    """Every weight moves."""
    base.requires_grad_(True)
    return base


def apply_lora(base: nn.Module, method: LoraMethod) -> nn.Module:
    """Freeze the base and add low-rank adapters (arXiv 2106.09685) through PEFT.

    Raises:
        ModelError: a target names no linear layer of the model.
    """
    if method.targets != "all-linear":
        _check_targets(base, method.targets)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=method.targets,
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        use_dora=method.dora,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # PEFT still uses a name that transformers has deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        try:
            model: nn.Module = get_peft_model(base, config)
        except ValueError as error:
            raise ModelError(
                f"method.targets={method.targets}",
                f"cannot be adapted ({str(error).splitlines()[0]})",
                "write all-linear, or names of linear layers",
            ) from error
    model.eval()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train()  # the one source of noise, and 0 unless written
    return model


METHODS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "full": apply_full,
    "lora": apply_lora,
}


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Keep PEFT from casting activations to float32, only for autocast to cast them back."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, under the names that the unwrapped model gives."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def without_method(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, an adapted model computes what its base does.

    A fully trained model has no base beside it: there the base is the model before its first step.
    """
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


class Exporter:
    """Writes what Hugging Face reads: a PEFT adapter, or a whole model in the dtype of its base.

    Made before a strategy wraps the model, and from then on independent of it: saving a sharded
    module would communicate, from a thread that the other ranks know nothing of.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._adapted = model if isinstance(model, PeftModel) else None
        self._dtype = dtype
        if self._adapted is None:
            with torch.device("meta"):
                self._shell: Any = type(model)(copy.deepcopy(model.config))
            self._shell.generation_config = model.generation_config
            self._rest = _untrained_state(model)

    def save(self, trained: dict[str, Tensor], directory: Path) -> None:
        """`trained` holds whole tensors under the names of `trained_parameters`."""
        if self._adapted is not None:
            # "auto" would ask the hub whether the embeddings were resized.
            self._adapted.save_pretrained(
                str(directory), state_dict=trained, save_embedding_layers=False
            )
            return
        state = {name: tensor.to(self._dtype) for name, tensor in trained.items()}
        self._shell.to(self._dtype).save_pretrained(
            str(directory), state_dict={**self._rest, **state}
        )


def _untrained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that are saved; tied weights are written once, under one name."""
    trained = trained_parameters(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name not in trained and name not in tied
    }


def _check_targets(base: nn.Module, targets: list[str]) -> None:
    names = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"
    ]
    endings = {name.rsplit(".", 1)[-1]: None for name in names}
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            near = difflib.get_close_matches(target, endings, n=3) or list(endings)
            raise ModelError(
                f"method.targets={target}",
                f"names no layer of this {type(base).__name__}",
                f"write all-linear, or names such as {', '.join(near)}",
            )
