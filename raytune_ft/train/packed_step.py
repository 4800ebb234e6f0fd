"""The gradients of many adapters in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raytune_ft.data.batch import MicroBatch
from raytune_ft.model.loss import label_positions
from raytune_ft.packed.lora import MultiLora, Window
from raytune_ft.train.engine import Engine


def accumulate_packed(
    engine: Engine,
    stack: MultiLora,
    window: Window,
    batch: MicroBatch,
    step_counts: Sequence[float],
) -> list[float]:
    """Add to each slot's gradient that of its own token losses over the count of its own step.

    Returns the sums of the losses by slot. No sum over slots reaches any of them, so that NaN in
    one stays there.
    """
    groups, device = window.groups, engine.strategy.device
    counts_G = label_positions(batch).view(groups, -1).sum(1)
    owners_N = torch.arange(groups, device=device).repeat_interleave(counts_G)
    shares_G = 1 / torch.tensor(step_counts, dtype=torch.float64, device=device)
    with stack.applied(window):
        losses_N = engine.training_losses(batch)
        shares_N = shares_G[owners_N].to(losses_N.dtype)
        # Not the strategy's: the optimizer sums these gradients over ranks, once a step.
        (losses_N * shares_N).sum().backward()
    sums_G = torch.zeros(groups, dtype=torch.float64, device=device)
    sums_G.index_add_(0, owners_N, losses_N.detach().double())
    found: list[float] = sums_G.tolist()
    return found
