"""Low-rank adapters, through PEFT."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from raytune_ft.config.methods import LoraMethod
from raytune_ft.errors import ModelError
from raytune_ft.model.methods.adapt import adapt
from raytune_ft.model.methods.pace import Pace
from raytune_ft.model.methods.start import begin_with_the_weights


def apply_lora(base: nn.Module, method: LoraMethod) -> nn.Module:
    """Freeze the base and add low-rank adapters (arXiv 2106.09685) through PEFT.

    Raises:
        ModelError: a target or a pattern names no layer of the model, or one that cannot begin as
            `method.init` says.
    """
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=method.targets,
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        use_dora=method.dora,
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=dict(method.alpha_pattern),
        init_lora_weights="gaussian" if method.init == "gaussian" else True,
        task_type="CAUSAL_LM",
    )
    model = adapt(base, config, method.targets)
    _check_patterns("rank_pattern", method.rank_pattern, model)
    _check_patterns("alpha_pattern", method.alpha_pattern, model)
    if method.init in ("pissa", "olora"):
        begin_with_the_weights(model, method.init)
    return model


def lora_paces(model: nn.Module, method: LoraMethod) -> dict[str, Pace]:
    """LoRA+ (arXiv 2402.12354): B moves faster than A."""
    if method.lr_ratio == 1.0:
        return {}
    return {
        name: Pace(lr_ratio=method.lr_ratio)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (".lora_B." in name or ".lora_embedding_B." in name)
    }


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Keep PEFT from casting activations to float32, only for autocast to cast them back."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def _check_patterns(key: str, patterns: Iterable[str], model: nn.Module) -> None:
    """PEFT goes on with a warning where a pattern means no module."""
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    endings = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    for pattern in patterns:
        try:
            found = any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
            rule = "names no adapted layer"
        except re.error as error:
            found, rule = False, f"is no regular expression ({error})"
        if not found:
            near = difflib.get_close_matches(pattern, endings, n=3) or endings
            raise ModelError(
                f"method.{key}.{pattern}", rule, f"write names such as {', '.join(near)}"
            )
