"""Adapters of PEFT: what all of them share, and `ia3`, `vera` and `oft`."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import IA3Config, OFTConfig, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from torch import nn
from torch.func import functional_call

from raytune_ft.config.methods import Ia3Method, OftMethod, VeraMethod
from raytune_ft.errors import ModelError, first_line
from raytune_ft.model.heads import head_modules
from raytune_ft.model.methods.base import Implementation


def adapt(base: nn.Module, config: Any, targets: str | list[str]) -> nn.Module:
    """Freeze the base and add the adapters of a PEFT configuration.

    `targets` is method.targets as written, for errors.

    Raises:
        ModelError: a target names no layer of the model, or a layer that PEFT cannot adapt.
    """
    if isinstance(targets, list):
        check_names("method.targets", targets, base)
    elif refused := _refused(base, config):
        config.exclude_modules = refused
    names = _some(_layers(base))
    with warnings.catch_warnings():
        # PEFT uses a deprecated name of transformers, and warns about what it does with transposed
        # layers (GPT-2) and fused experts (Mixtral), which is right.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)
        warnings.filterwarnings("ignore", "Invalid `oft_block_size`", UserWarning)
        try:
            model: nn.Module = get_peft_model(base, config)
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"method.targets={targets}",
                f"cannot be adapted ({first_line(error)})",
                f"write all-linear, or names of linear layers such as {names}",
            ) from error
    model.eval()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name, child in module.named_children():
                if name.endswith("_dropout"):
                    child.train()  # the only noise; 0 by default
    return model


def task_of(base: nn.Module) -> dict[str, Any]:
    """PEFT's keys for a base that predicts tokens, or has a task head to train and save."""
    heads = head_modules(base)
    return {"task_type": "SEQ_CLS" if heads else "CAUSAL_LM", "modules_to_save": heads or None}


def check_names(key: str, targets: Sequence[str], base: nn.Module) -> None:
    """Raises ModelError for a target with which no name of a layer ends."""
    names = _layers(base)
    endings = {name.rsplit(".", 1)[-1]: None for name in names}
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            near = difflib.get_close_matches(target, endings, n=3) or list(endings)
            raise ModelError(
                f"{key}={target}",
                f"names no layer of this {type(base).__name__}",
                f"write all-linear, or names such as {', '.join(near)}",
            )


def _layers(base: nn.Module) -> list[str]:
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"
    ]


def _refused(base: nn.Module, config: Any) -> list[str]:
    """Names of linear layers that cannot be adapted: those that PEFT refuses, since kernels of
    Mamba may read their weights without calling them, and those that are no plain product, such as
    routers and grouped projections.
    """
    refused: dict[str, None] = {}
    for path, module in base.named_modules():
        name = path.rsplit(".", 1)[-1]
        if isinstance(module, nn.Linear) and name not in refused:
            try:
                _check_lora_target_modules_mamba(config, base, name)
            except ValueError:
                refused[name] = None
            if not _is_product(module):
                refused[name] = None
    return list(refused)


def _is_product(layer: nn.Linear) -> bool:
    """Whether a layer gives one row of its outputs for one row of its inputs."""
    weights = dict(layer.named_parameters())
    if type(layer) is nn.Linear or not weights["weight"].is_floating_point():  # 4 bits
        return True
    absent = {name: weight.to("meta") for name, weight in weights.items()}
    try:
        row = functional_call(layer, absent, torch.empty(1, layer.in_features, device="meta"))
    except (RuntimeError, ValueError, IndexError):
        return False
    return isinstance(row, torch.Tensor) and row.shape == (1, layer.out_features)


def _some(names: Sequence[str]) -> str:
    return ", ".join(list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))[:4])


def apply_ia3(base: nn.Module, method: Ia3Method) -> nn.Module:
    """Factors of activations (arXiv 2205.05638). Raises ModelError, see `adapt`."""
    if isinstance(method.feedforward, list):
        check_names("method.feedforward", method.feedforward, base)
    config = IA3Config(
        target_modules=None if method.targets == "auto" else method.targets,
        feedforward_modules=None if method.feedforward == "auto" else method.feedforward,
        **task_of(base),
    )
    return adapt(base, config, method.targets)


def apply_vera(base: nn.Module, method: VeraMethod) -> nn.Module:
    """Vectors around shared random matrices (arXiv 2310.11454). Raises ModelError, see `adapt`."""
    config = VeraConfig(
        r=method.rank,
        target_modules=method.targets,
        vera_dropout=method.dropout,
        d_initial=method.d_initial,
        projection_prng_key=method.projection_seed,
        save_projection=True,
        **task_of(base),
    )
    return adapt(base, config, method.targets)


def apply_oft(base: nn.Module, method: OftMethod) -> nn.Module:
    """Rotations of inputs (arXiv 2306.07280). Raises ModelError, see `adapt`."""
    config = OFTConfig(
        r=0,
        oft_block_size=method.block_size,
        target_modules=method.targets,
        use_cayley_neumann=method.cayley_neumann,
        coft=method.coft,
        eps=method.eps,
        block_share=method.block_share,
        **task_of(base),
    )
    return adapt(base, config, method.targets)


IA3 = Implementation(apply_ia3)
VERA = Implementation(apply_vera)
OFT = Implementation(apply_oft)
