"""Bases held in 4 bits by bitsandbytes: when it is imported, and how weights are rounded.

Loads no torch, since it is asked before torch is loaded.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from raytune_ft.config.execution import variants
from raytune_ft.config.methods import METHODS, MethodConfig
from raytune_ft.config.schema import Config
from raytune_ft.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn


def quantises(config: Config) -> bool:
    """Whether a run of this config, or one of its trials, holds its base in 4 bits."""
    return any(METHODS[run.method.name].quantised for run in variants(config))


def skip_unused_bitsandbytes(config: Config) -> None:
    """Keep this process from importing bitsandbytes where no base is held in 4 bits: PEFT would,
    wherever it is installed, which takes 1.7 s of CPU time. To be called before PEFT is imported.
    """
    if not quantises(config):
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    elif sys.modules.get("bitsandbytes", config) is None:  # of an earlier config
        del sys.modules["bitsandbytes"]


def check_backend(method: MethodConfig) -> None:
    """Raises ModelError where a method needs bitsandbytes and it is not installed."""
    if METHODS[method.name].quantised and find_spec("bitsandbytes") is None:
        raise ModelError(
            f"method.name={method.name}",
            "holds the base in 4 bits by bitsandbytes, which is not installed here",
            "pip install 'raytune-ft[quantize]', or write method.name: lora",
        )


def quantisation_of(method: Any, compute: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a base in 4 bits; none for methods that do not round it.

    Raises:
        ModelError: see `check_backend`.
    """
    if not METHODS[method.name].quantised:
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
    """Keep bitsandbytes from repacking weights on some CPUs in the first pass without a gradient,
    which rounds their scales again and refuses widths that are not a multiple of 64.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - typed as a Tensor
