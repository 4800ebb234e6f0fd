"""One optimizer step: the gradient of a batch, whatever its layout."""

from __future__ import annotations

from collections.abc import Callable

import torch

from raytune_ft.data.order import Indices
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.train.engine import Engine
from raytune_ft.train.watchdog import Beat, unheard


def accumulate_gradients(
    engine: Engine,
    split: TokenizedSplit,
    indices: Indices,
    ask: Callable[[], tuple[bool, ...]] = tuple,
    beat: Beat = unheard,
) -> tuple[float, tuple[bool, ...]]:
    """Add the gradient of the objective's mean loss over `indices`.

    Returns that mean and, to each question that `ask` answers, whether any rank says yes, which
    costs nothing here. The sum of the losses is divided once, by the objective's count of the
    whole step on all ranks, which every rank knows beforehand.
    """
    strategy = engine.strategy
    count = engine.objective.count(split, indices) or 1  # nothing counts: the gradient is zero
    layout = engine.layout(split.lengths[indices].tolist())
    loss_sum = torch.zeros((), dtype=torch.float64)
    beat(0, len(layout))
    for number, rows in enumerate(layout, start=1):
        batch = engine.collate(split, indices, rows)
        with strategy.accumulate(last=number == len(layout)):
            loss = engine.training_losses(batch).sum()
            beat(number - 0.5, len(layout))
            strategy.backward(loss / count)
        loss_sum += loss.detach().double().cpu()
        beat(number, len(layout))
    sums = torch.tensor([loss_sum.item(), *map(float, ask())], dtype=torch.float64)
    total, *votes = strategy.sum(sums.to(strategy.device)).tolist()
    return total / count, tuple(vote > 0 for vote in votes)
