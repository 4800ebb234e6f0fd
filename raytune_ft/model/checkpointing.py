"""Activation checkpointing: blocks are computed again in the backward instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from raytune_ft.model.blocks import find_blocks

Activations = Literal["none", "selective", "full"]

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm"})


def checkpoint_activations(model: nn.Module, activations: Activations) -> None:
    """Wrap the forward of every repeated block; names of parameters stay.

    Not the block: a strategy's hooks on it gather its weights, and stay outside of what is
    computed twice. transformers' own switch does nothing in eval mode, in which models are here.
    """
    if activations == "none":
        return
    for block in find_blocks(model).values():
        block.forward = _twice(block.forward, selective=activations == "selective")


def _twice(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    keeping = partial(create_selective_checkpoint_contexts, _policy)
    contexts = keeping if selective else noop_context_fn

    def computed_twice(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **named)

    return computed_twice


def _policy(
    context: SelectiveCheckpointContext, operator: Any, *arguments: Any, **named: Any
) -> CheckpointPolicy:
    """Keep what is dear to compute: matrix products and attention."""
    name = operator.name().removeprefix("aten::").partition(".")[0]
    dear = name in _PRODUCTS or "scaled_dot_product" in name
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
