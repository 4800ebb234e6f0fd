"""Adapters of PEFT with few weights of their own: factors, vectors and rotations."""

from __future__ import annotations

from peft import IA3Config, OFTConfig, VeraConfig
from torch import nn

from raytune_ft.config.methods import Ia3Method, OftMethod, VeraMethod
from raytune_ft.model.methods.adapt import adapt, check_names, task_of


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
