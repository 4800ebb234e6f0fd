"""Measure a model on a whole split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.order import Indices
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import Diverged
from raytune_ft.model.loss import label_positions, token_losses
from raytune_ft.records import EvalMetrics
from raytune_ft.train.engine import Engine
from raytune_ft.train.heartbeat import Beat, unheard

BLOCK_EXAMPLES = 1024
"""Laid out together; bounds the time of packing, which grows faster than its input."""


@dataclass(frozen=True)
class Scores:
    """Sums over a split, divided once.

    `exact_match` is the share of examples of which every label token is the most likely one given
    the reference before it; that is when greedy decoding reproduces the completion.
    `loss_by_source` is of the split's sources by name, where it has several.
    """

    loss: float
    token_accuracy: float
    exact_match: float
    loss_by_source: Mapping[str, float] = field(default_factory=dict)

    def after(self, step: int, examples: int) -> EvalMetrics:
        """As what a run has come to. Raises Diverged where the loss is not finite."""
        if not math.isfinite(self.loss):
            raise Diverged(f"step {step}: evaluation loss {self.loss}")
        return EvalMetrics(
            step,
            examples,
            self.loss,
            self.token_accuracy,
            self.exact_match,
            dict(self.loss_by_source),
        )


def evaluate(engine: Engine, split: TokenizedSplit, beat: Beat = unheard) -> Scores:
    """Scores of the model as it is now; all ranks share the work and get the same answer."""
    return evaluate_groups(engine, split, 1, beat)[0]


@torch.no_grad()
def evaluate_groups(
    engine: Engine, split: TokenizedSplit, groups: int, beat: Beat = unheard
) -> list[Scores]:
    """Scores of each of several models that share one, which sees the rows once for each of them.

    The g-th group of rows is the g-th model's.
    """
    engine = replace(engine, micro_tokens=max(1, engine.micro_tokens // groups))
    # Loss, right tokens, wholly right examples; then the loss of each source.
    numbers, tokens = _sources(split)
    sums_GC = torch.zeros(groups, 3 + len(tokens), dtype=torch.float64).to(engine.strategy.device)
    for start in range(0, len(split), BLOCK_EXAMPLES):
        indices = np.arange(start, min(start + BLOCK_EXAMPLES, len(split)), dtype=np.int64)
        layout = engine.layout(split.lengths[indices].tolist())
        beat(0, len(layout))
        for number, rows in enumerate(layout, start=1):
            batch = engine.collate(split, indices, rows)
            sums_GC += _sums(engine, batch, groups, numbers[indices], len(tokens))
            beat(number, len(layout))
    label_tokens = int(split.label_counts.sum())
    return [
        Scores(
            loss / label_tokens,
            correct / label_tokens,
            exact / len(split),
            {
                name: loss / count
                for name, loss, count in zip(split.sources, own, tokens, strict=False)
                if count
            },
        )
        for loss, correct, exact, *own in engine.strategy.sum(sums_GC).tolist()
    ]


def _sources(split: TokenizedSplit) -> tuple[Indices, list[int]]:
    """The source of each example, and the label tokens of each source where there are several."""
    numbers = split.source_numbers
    if numbers is None:
        return np.zeros(len(split), np.int64), []
    counts = np.bincount(numbers, split.label_counts, minlength=len(split.sources))
    return numbers, [int(count) for count in counts]


def _sums(
    engine: Engine, batch: MicroBatch, groups: int, numbers_E: Indices, sources: int
) -> torch.Tensor:
    """`[G, 3 + sources]` of one micro-batch; `numbers_E` are the sources of the step's list."""
    keep_BS = label_positions(batch)
    owners_N = batch.owners_BS()[keep_BS]
    examples = [span.example for span in batch.spans]
    batch = batch.repeated(groups)
    logits_MV = engine.logits(batch)
    losses_GN = token_losses(logits_MV, batch).view(groups, -1)
    right_GN = (logits_MV.argmax(-1) == batch.targets_BS[label_positions(batch)]).view(groups, -1)
    wrong_GE = right_GN.new_zeros(groups, max(examples, default=0) + 1, dtype=torch.int64)
    wrong_GE.index_add_(1, owners_N, (~right_GN).long())
    exact_G = (wrong_GE[:, examples] == 0).sum(1)
    losses_GN = losses_GN.double()
    whole_G3 = torch.stack([losses_GN.sum(1), right_GN.sum(1), exact_G], 1)
    numbers_N = torch.from_numpy(numbers_E).to(owners_N.device)[owners_N]
    own_GS = losses_GN.new_zeros(groups, sources)
    if sources:
        own_GS.index_add_(1, numbers_N, losses_GN)
    return torch.cat([whole_G3, own_GS], 1)
