"""Token losses of a micro-batch; the head is computed at label positions alone.

Shapes: B rows, S tokens, N label tokens, H hidden units, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytune_ft.data.batch import NO_TARGET, MicroBatch


def label_logits(
    model: nn.Module, head: nn.Module | None, inputs: Mapping[str, Any], keep_BS: Tensor
) -> Tensor:
    """`logits_NV` at the positions in `keep_BS`, in row order, float32 or wider.

    The head is applied to those positions alone. `head` is the output embedding inside `model`,
    found before a strategy wrapped it. A model that has none, or does not call it, gives logits for
    all positions, and those of `keep_BS` are selected.
    """

    def select(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][keep_BS], *arguments[1:])

    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    logits_NV = logits[keep_BS] if logits.ndim == 3 else logits
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


def token_losses(logits_NV: Tensor, batch: MicroBatch, smoothing: float = 0.0) -> Tensor:
    """Cross entropy `[N]` of every label token."""
    targets_N = batch.targets_BS[label_positions(batch)]
    return F.cross_entropy(logits_NV, targets_N, reduction="none", label_smoothing=smoothing)


def label_positions(batch: MicroBatch) -> Tensor:
    """`keep_BS`: the positions that predict a label token."""
    return batch.targets_BS != NO_TARGET
