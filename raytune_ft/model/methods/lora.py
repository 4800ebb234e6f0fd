"""Low-rank adapters, through PEFT."""

from __future__ import annotations

import difflib
import warnings

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from raytune_ft.config.methods import LoraMethod
from raytune_ft.errors import ModelError
from raytune_ft.model.heads import head_modules


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
        task_type="SEQ_CLS" if head_modules(base) else "CAUSAL_LM",
        modules_to_save=head_modules(base) or None,
    )
    with warnings.catch_warnings():
        # PEFT still uses a name that transformers has deprecated, and says what it does for
        # transposed layers (GPT-2) and fused experts (Mixtral), which is right.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)
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


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Keep PEFT from casting activations to float32, only for autocast to cast them back."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


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
