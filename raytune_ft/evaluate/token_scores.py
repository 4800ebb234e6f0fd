"""What a model makes of the references: teacher-forced losses, one value for each example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.order import Indices
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.evaluate.scores import Column, Scores
from raytune_ft.model.loss import label_positions, token_losses
from raytune_ft.train.engine import Engine
from raytune_ft.train.evaluation import BLOCK_EXAMPLES


@dataclass(frozen=True, eq=False)
class Forced:
    """Columns `[n]`: summed loss, label tokens, and those of them that were the likeliest."""

    losses: Column
    tokens: Column
    right: Column


@torch.no_grad()
def forced(engine: Engine, split: TokenizedSplit) -> Forced:
    """Every example of the split, given the reference up to each label token."""
    sums = np.zeros((2, len(split)))
    for indices, batch in batches(engine, split):
        logits_NV = engine.logits(batch)
        right_N = logits_NV.argmax(-1) == batch.targets_BS[label_positions(batch)]
        _add(sums, indices, batch, token_losses(logits_NV, batch), right_N)
    return Forced(sums[0], split.label_counts.astype(np.float64), sums[1])


@torch.no_grad()
def retention(engine: Engine, base: Engine, split: TokenizedSplit) -> dict[str, Scores]:
    """Loss of a model on a general set, and the divergence KL(base || model) per token of it.

    Both models are in memory.
    """
    sums = np.zeros((2, len(split)))
    for indices, batch in batches(engine, split):
        logits_NV, base_NV = engine.logits(batch), base.logits(batch)
        kl_N = F.kl_div(
            logits_NV.log_softmax(-1), base_NV.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        _add(sums, indices, batch, token_losses(logits_NV, batch), kl_N)
    tokens = split.label_counts.astype(np.float64)
    return {
        "retention_loss": Scores((sums[0], tokens), "min"),
        "retention_kl": Scores((sums[1], tokens), "min"),
    }


def batches(engine: Engine, split: TokenizedSplit) -> Iterator[tuple[Indices, MicroBatch]]:
    """Every example of the split once: the block that it was laid out with, and a batch of it."""
    for start in range(0, len(split), BLOCK_EXAMPLES):
        indices = np.arange(start, min(start + BLOCK_EXAMPLES, len(split)), dtype=np.int64)
        for rows in engine.layout(split.lengths[indices].tolist()):
            yield indices, engine.collate(split, indices, rows)


def _add(sums: Column, indices: Indices, batch: MicroBatch, *values_N: torch.Tensor) -> None:
    """Sum token values `[N]` into the columns of their examples."""
    owners_N = batch.owners_BS()[label_positions(batch)].cpu().numpy()
    for column, values in zip(sums, values_N, strict=True):
        np.add.at(column, indices[owners_N], values.double().cpu().numpy())
