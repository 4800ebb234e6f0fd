"""Measure a model on a whole split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from raytune_ft.data.order import Indices
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import Diverged
from raytune_ft.records import EvalMetrics
from raytune_ft.train.engine import Engine
from raytune_ft.train.watchdog import Beat, unheard

BLOCK_EXAMPLES = 1024
"""Laid out together; bounds the time of packing, which grows faster than its input."""


@dataclass(frozen=True)
class Scores:
    """Figures of a split, under their names in `EvalMetrics`.

    `loss_by_source` is of the split's sources by name, where it has several.
    """

    figures: dict[str, float]
    loss_by_source: Mapping[str, float] = field(default_factory=dict)

    def after(self, step: int, examples: int) -> EvalMetrics:
        """As what a run has come to. Raises Diverged where the loss is not finite."""
        loss = self.figures["eval_loss"]
        if not math.isfinite(loss):
            raise Diverged(f"step {step}: evaluation loss {loss}")
        own = dict(self.loss_by_source)
        return EvalMetrics(step, examples, **self.figures, eval_loss_by_source=own)


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
    objective, sources = engine.objective, _sources(split)
    sums_S = [_sums(engine, split, own, groups, beat) for own in sources.values()]
    everything = np.arange(len(split))
    summed_SGK = engine.strategy.sum(torch.stack(sums_S)).cpu().numpy()
    return [
        Scores(
            objective.figures(sums_SK.sum(0), split, everything),
            {
                name: objective.figures(sums_K, split, own)["eval_loss"]
                for (name, own), sums_K in zip(sources.items(), sums_SK, strict=True)
                if len(sources) > 1
            },
        )
        for sums_SK in summed_SGK.swapaxes(0, 1)
    ]


def _sources(split: TokenizedSplit) -> dict[str, Indices]:
    """The examples of each source that has some; of all together where nobody tells them apart."""
    numbers = split.source_numbers
    if numbers is None:
        return {"": np.arange(len(split))}
    own = {name: np.flatnonzero(numbers == number) for number, name in enumerate(split.sources)}
    return {name: indices for name, indices in own.items() if len(indices)}


def _sums(
    engine: Engine, split: TokenizedSplit, examples: Indices, groups: int, beat: Beat
) -> torch.Tensor:
    """`[G, K]`: what the objective adds up over these examples, on this rank."""
    objective, sums_GK = engine.objective, None
    for start in range(0, len(examples), BLOCK_EXAMPLES):
        indices = examples[start : start + BLOCK_EXAMPLES]
        layout = engine.layout(split.lengths[indices].tolist())
        beat(0, len(layout))
        for number, rows in enumerate(layout, start=1):
            batch = engine.collate(split, indices, rows).repeated(groups)
            sums = objective.sums(objective.outputs(engine, batch), batch, groups).double()
            sums_GK = sums if sums_GK is None else sums_GK + sums
            beat(number, len(layout))
    assert sums_GK is not None
    return sums_GK
