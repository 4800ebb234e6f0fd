"""Low-rank adapters (`lora`, `qlora`), through PEFT."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

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
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = AddedInPlace
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


class AddedInPlace(Linear):
    """PEFT's adapted layer, in which `scale (x A^T) B^T` is added to the product of the base, and
    its gradient to that of the base, within a product: PEFT writes, scales and reads each of them
    first, which takes a tenth of the time of a step on a CPU.
    """

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """`[..., O]` from `[..., I]`."""
        weights = None if arguments or named else self._weights(x)
        if weights is None:
            output: Tensor = super().forward(x, *arguments, **named)
            return output
        x_TI = x.to(weights[0].dtype).reshape(-1, x.shape[-1])
        scale = self.scaling[self.active_adapters[0]]
        if torch.is_grad_enabled():
            y_TO: Tensor = _LinearWithAdapter.apply(x_TI, *weights, scale)
        else:
            y_TO, _ = _product(x_TI, *weights, scale)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor] | None:
        """`weight_OI`, `bias_O`, `A_RI` and `B_OR` in the dtype of products; None where the layer
        does more than that, or where a hook has to see a part of it, as where ZeRO 3 gathers it.
        """
        adapters = self.active_adapters
        if self.disable_adapters or self.merged or len(adapters) != 1:
            return None
        # By the dictionaries of `nn.Module`, whose `__getattr__` takes 20 us for all of these.
        adapter, inside = adapters[0], self._modules
        a = inside["lora_A"]._modules.get(adapter)
        if a is None or adapter in self.lora_variant:
            return None
        base, b = inside["base_layer"], inside["lora_B"]._modules[adapter]
        for part in (base, a, b):
            if type(part) is not nn.Linear or part._forward_pre_hooks or part._forward_hooks:
                return None
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        dropout = type(inside["lora_dropout"]._modules[adapter]) is not nn.Identity
        if trained or dropout or b._parameters["bias"] is not None:
            return None
        kind = x.device.type
        a_RI, b_OR = a._parameters["weight"], b._parameters["weight"]
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        elif all(each is None or each.dtype == x.dtype for each in (weight, bias, a_RI, b_OR)):
            dtype = x.dtype
        else:
            return None
        bias_O = None if bias is None else bias.to(dtype)
        return weight.to(dtype), bias_O, a_RI.to(dtype), b_OR.to(dtype)


def _product(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output `y_TO`, and `h_TR`, the scaled product with A."""
    h_TR = F.linear(x_TI, a_RI).mul_(scale)
    return F.linear(x_TI, weight_OI, bias_O).addmm_(h_TR, b_OR.t()), h_TR


class _LinearWithAdapter(torch.autograd.Function):
    """`x W^T + bias + scale (x A^T) B^T` over T tokens; the base is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        y_TO, h_TR = _product(x_TI, weight_OI, bias_O, a_RI, b_OR, scale)
        ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR, h_TR)
        ctx.scale = scale
        return y_TO

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = outputs
        x_TI, weight_OI, a_RI, b_OR, h_TR = ctx.saved_tensors
        dh_TR = torch.mm(dy_TO, b_OR).mul_(ctx.scale)
        da_RI, db_OR = torch.mm(dh_TR.t(), x_TI), torch.mm(dy_TO.t(), h_TR)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = torch.mm(dy_TO, weight_OI).addmm_(dh_TR, a_RI)
        return dx_TI, None, None, da_RI, db_OR, None


LORA = Implementation(apply_lora, lora_plus_groups)
