"""One optimizer step: the gradient of a batch, whatever its layout."""

from __future__ import annotations

import torch

from raytune_ft.data.order import Indices
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.loss import token_losses
from raytune_ft.train.engine import Engine


def accumulate_gradients(engine: Engine, split: TokenizedSplit, indices: Indices) -> float:
    """Add the gradient of the mean loss over the label tokens of `indices`; return that mean.

    The sum of the token losses is divided once, by the number of label tokens of the whole step
    on all ranks, which every rank knows beforehand.
    """
    strategy = engine.strategy
    label_tokens = int(split.label_counts[indices].sum())
    layout = engine.layout(split.lengths[indices].tolist())
    loss_sum = torch.zeros((), dtype=torch.float64)
    for number, rows in enumerate(layout, start=1):
        batch = engine.collate(split, indices, rows)
        with strategy.accumulate(engine.wrapped, last=number == len(layout)):
            loss = token_losses(engine.logits(batch), batch).sum()
            (loss * (strategy.loss_factor / label_tokens)).backward()
        loss_sum += loss.detach().double().cpu()
    return strategy.sum(loss_sum.to(strategy.device)).item() / label_tokens
