"""Measure a model on a whole split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.loss import label_positions, token_losses
from raytune_ft.train.engine import Engine
from raytune_ft.train.heartbeat import Beat, unheard

BLOCK_EXAMPLES = 1024
"""Laid out together; bounds the time of packing, which grows faster than its input."""


@dataclass(frozen=True)
class Scores:
    """Sums over a split, divided once.

    `exact_match` is the share of examples of which every label token is the most likely one given
    the reference before it; that is when greedy decoding reproduces the completion.
    """

    loss: float
    token_accuracy: float
    exact_match: float


def evaluate(engine: Engine, split: TokenizedSplit, beat: Beat = unheard) -> Scores:
    """Scores of the model as it is now; all ranks share the work and get the same answer."""
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(split), BLOCK_EXAMPLES):
        indices = np.arange(start, min(start + BLOCK_EXAMPLES, len(split)), dtype=np.int64)
        layout = engine.layout(split.lengths[indices].tolist())
        beat(0, len(layout))
        for number, rows in enumerate(layout, start=1):
            sums += _sums(engine, engine.collate(split, indices, rows))
            beat(number, len(layout))
    loss, correct, exact = engine.strategy.sum(sums.to(engine.strategy.device)).tolist()
    label_tokens = int(split.label_counts.sum())
    return Scores(loss / label_tokens, correct / label_tokens, exact / len(split))


@torch.no_grad()
def _sums(engine: Engine, batch: MicroBatch) -> torch.Tensor:
    """Loss, right tokens and wholly right examples of one micro-batch."""
    keep_BS = label_positions(batch)
    logits_NV = engine.logits(batch, keep_BS)
    losses_N = token_losses(logits_NV, batch)
    right_N = logits_NV.argmax(-1) == batch.targets_BS[keep_BS]
    wrong_examples = batch.owners_BS()[keep_BS][~right_N].unique()
    return torch.tensor(
        [
            losses_N.double().sum().item(),
            right_N.sum().item(),
            len(batch.spans) - len(wrong_examples),
        ],
        dtype=torch.float64,
    )
