"""Measure a model on a whole split."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import Diverged
from raytune_ft.records import EvalMetrics
from raytune_ft.train.engine import Engine
from raytune_ft.train.heartbeat import Beat, unheard

BLOCK_EXAMPLES = 1024
"""Laid out together; bounds the time of packing, which grows faster than its input."""


@dataclass(frozen=True)
class Scores:
    """Figures of a split, under their names in `EvalMetrics`."""

    figures: dict[str, float]

    def after(self, step: int, examples: int) -> EvalMetrics:
        """As what a run has come to. Raises Diverged where the loss is not finite."""
        loss = self.figures["eval_loss"]
        if not math.isfinite(loss):
            raise Diverged(f"step {step}: evaluation loss {loss}")
        return EvalMetrics(step, examples, **self.figures)


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
    objective, sums_GK = engine.objective, None
    for start in range(0, len(split), BLOCK_EXAMPLES):
        indices = np.arange(start, min(start + BLOCK_EXAMPLES, len(split)), dtype=np.int64)
        layout = engine.layout(split.lengths[indices].tolist())
        beat(0, len(layout))
        for number, rows in enumerate(layout, start=1):
            batch = engine.collate(split, indices, rows).repeated(groups)
            sums = objective.sums(objective.outputs(engine, batch), batch, groups).double()
            sums_GK = sums if sums_GK is None else sums_GK + sums
            beat(number, len(layout))
    assert sums_GK is not None
    summed = engine.strategy.sum(sums_GK).cpu().numpy()
    return [Scores(objective.figures(sums_K, split)) for sums_K in summed]
