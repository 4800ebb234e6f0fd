"""Low-rank adapters (`lora`, `qlora`), through PEFT."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from raytune_ft.config.methods import LoraMethod, QloraMethod
from raytune_ft.errors import ModelError
from raytune_ft.model.methods.base import Implementation, ParamGroup
from raytune_ft.model.methods.peft import adapt, task_of
from raytune_ft.model.methods.pissa import begin_with_the_weights


def apply_lora(base: nn.Module, method: LoraMethod | QloraMethod) -> nn.Module:
    """Freeze the base and add low-rank adapters (arXiv 2106.09685) through PEFT.

    The base of `qlora` was read in 4 bits, and its adapters begin by default.

    Raises:
        ModelError: a target or a pattern names no layer of the model, or one that `method.init`
            does not support.
    """
    _check_regular("rank_pattern", method.rank_pattern)
    _check_regular("alpha_pattern", method.alpha_pattern)
    init = method.init if isinstance(method, LoraMethod) else "default"
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=method.targets,
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        use_dora=method.dora,
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=dict(method.alpha_pattern),
        init_lora_weights="gaussian" if init == "gaussian" else True,
        **task_of(base),
    )
    model = adapt(base, config, method.targets)
    _check_patterns("rank_pattern", method.rank_pattern, model)
    _check_patterns("alpha_pattern", method.alpha_pattern, model)
    if isinstance(method, LoraMethod) and method.begins_with_weights:
        begin_with_the_weights(model, init)
    return model


def lora_plus_groups(model: nn.Module, method: LoraMethod | QloraMethod) -> dict[str, ParamGroup]:
    """LoRA+ (arXiv 2402.12354): the learning rate of B is a multiple of that of A."""
    if method.lr_ratio == 1.0:
        return {}
    return {
        name: ParamGroup(lr_ratio=method.lr_ratio)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (".lora_B." in name or ".lora_embedding_B." in name)
    }


def _check_regular(key: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ModelError(
                f"method.{key}.{pattern}",
                f"is not a regular expression ({error})",
                "write the ending of a module's name, such as q_proj",
            ) from error


def _check_patterns(key: str, patterns: Iterable[str], model: nn.Module) -> None:
    """PEFT only warns about a pattern that matches no module."""
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    endings = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    for pattern in patterns:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            near = difflib.get_close_matches(pattern, endings, n=3) or endings
            raise ModelError(
                f"method.{key}.{pattern}",
                "names no adapted layer",
                f"write names such as {', '.join(near)}",
            )


LORA = Implementation(apply_lora, lora_plus_groups)
