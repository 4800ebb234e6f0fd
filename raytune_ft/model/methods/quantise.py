"""A base in 4 bits, by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from raytune_ft.config.methods import MethodConfig, QloraMethod
from raytune_ft.errors import ModelError


def check_backend(method: MethodConfig) -> None:
    """Raises ModelError where a method needs bitsandbytes and it is not there."""
    if isinstance(method, QloraMethod) and find_spec("bitsandbytes") is None:
        raise ModelError(
            "method.name=qlora",
            "holds the base in 4 bits by bitsandbytes, which is not installed here",
            "pip install 'raytune-ft[quantize]', or write method.name: lora",
        )


def quantisation_of(method: MethodConfig, compute: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told; nothing for methods that leave the base as it is.

    Raises:
        ModelError: see `check_backend`.
    """
    if not isinstance(method, QloraMethod):
        return {}
    check_backend(method)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method.quantisation,
        bnb_4bit_use_double_quant=method.double_quantisation,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": config}


def keep_as_rounded(base: nn.Module) -> None:
    """On some CPUs bitsandbytes would lay weights out anew in a first pass without a gradient,
    round their scales once more, and refuse widths that are no multiple of 64.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - typed as a Tensor
