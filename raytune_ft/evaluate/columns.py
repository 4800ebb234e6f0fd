"""The columns of a whole split, one value for each example, that figures are computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from raytune_ft.config.metrics import RETENTION
from raytune_ft.config.objectives import LOSS, Figure
from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.evaluate.scores import Column, Scores
from raytune_ft.model.objectives import Columns, Objective
from raytune_ft.model.objectives.preference import label_logps
from raytune_ft.model.objectives.tokens import token_losses
from raytune_ft.strategy import Strategy
from raytune_ft.train.evaluation import BLOCK_EXAMPLES, label_values
from raytune_ft.train.model_runner import ModelRunner


@torch.no_grad()
def columns_of(
    runner: ModelRunner, objective: Objective, split: TokenizedSplit
) -> dict[str, Column]:
    """`[n]` or `[n, L]` each, in the order of the split; all ranks share the work and get all."""
    objective = objective.over(split, np.arange(len(split)), runner)
    found = _Filled(len(split))
    for indices, batch in batches(runner, split):
        found.add(indices, batch, objective.columns(runner, batch, 1))
    return found.whole(runner.strategy) | objective.known(split, np.arange(len(split)))


def figures_of(
    columns: dict[str, Column], figures: Sequence[Figure], split: TokenizedSplit
) -> dict[str, Scores]:
    """Figures by their names in promotion, and the loss of each source where there are several."""
    found = {figure.promoted: Scores.of(figure, columns) for figure in figures}
    numbers = split.source_numbers
    if numbers is None:
        return found
    for number, name in enumerate(split.sources):
        rows = np.flatnonzero(numbers == number)
        if len(rows):
            own = {column: columns[column][rows] for column in LOSS.columns}
            found[f"{LOSS.name}_{name}"] = replace(Scores.of(LOSS, own), by_example=False)
    return found


@torch.no_grad()
def retention(runner: ModelRunner, base: ModelRunner, split: TokenizedSplit) -> dict[str, Scores]:
    """Loss of a model on a general set, and the divergence KL(base || model) per token of it.

    Both models are in memory, on all ranks that share the work.
    """
    found = _Filled(len(split))
    for indices, batch in batches(runner, split):
        logits_NV, base_NV = runner.logits(batch), base.logits(batch)
        kl_N = F.kl_div(
            logits_NV.log_softmax(-1), base_NV.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        values = zip(RETENTION, (token_losses(logits_NV, batch), kl_N), strict=True)
        found.add(indices, batch, Columns({name: row.unsqueeze(0) for name, row in values}))
    tokens, columns = split.label_counts.astype(np.float64), found.whole(runner.strategy)
    return {name: Scores((columns[name], tokens), each.mode) for name, each in RETENTION.items()}


def label_columns_of(
    runner: ModelRunner, split: TokenizedSplit, examples: Indices
) -> npt.NDArray[np.float64]:
    """`[label tokens]`, the log-probability of each label token of these examples, in the order of
    the split; all ranks share the work and get all.
    """
    return label_values(runner, split, examples, lambda batch: label_logps(runner, batch)[None])[0]


def batches(runner: ModelRunner, split: TokenizedSplit) -> Iterator[tuple[Indices, MicroBatch]]:
    """This rank's examples of the split once: the block that each was laid out with, and a batch.

    Batches without examples make every rank call its model equally often.
    """
    for start in range(0, len(split), BLOCK_EXAMPLES):
        indices = np.arange(start, min(start + BLOCK_EXAMPLES, len(split)), dtype=np.int64)
        for rows in runner.layout(split, indices):
            yield indices, runner.collate(split, indices, rows)


class _Filled:
    """Columns of `n` examples that batches fill; an example of another rank stays 0."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._columns: dict[str, npt.NDArray[np.generic]] = {}

    def add(self, indices: Indices, batch: MicroBatch, made: Columns) -> None:
        """Sum the values of label tokens into their examples, and put those of examples there."""
        own = indices[list(batch.places)]
        spans = indices[[span.sequence // batch.parts for span in batch.spans]]
        owners_N = batch.owners_N.cpu().numpy()
        for name, values_GN in made.rows.items():
            column = self._columns.setdefault(name, np.zeros(self._n))
            np.add.at(column, spans[owners_N], values_GN[0].double().cpu().numpy())
        for name, values_GE in made.examples.items():
            values = values_GE[0].cpu().numpy()
            empty = np.zeros((self._n, *values.shape[1:]), values.dtype)
            self._columns.setdefault(name, empty)[own] = values

    def whole(self, strategy: Strategy) -> dict[str, Column]:
        """The columns of all ranks: each example has its value on one of them."""
        if strategy.world_size == 1:
            return dict(self._columns)
        return {name: _summed(values, strategy) for name, values in self._columns.items()}


def _summed(values: npt.NDArray[np.generic], strategy: Strategy) -> Column:
    """Exact, since all but one of the addends are 0; a collective cannot add bits."""
    wide = values.astype(np.int64) if values.dtype == bool else values
    total = strategy.sum(torch.from_numpy(wide).to(strategy.device)).cpu().numpy()
    return total.astype(values.dtype)
