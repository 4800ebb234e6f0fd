"""Measure a model on a whole split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytune_ft.config.objectives import LOSS
from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.split import TokenizedSplit, parts_of
from raytune_ft.records import EvalMetrics
from raytune_ft.train.model_runner import ModelRunner
from raytune_ft.train.watchdog import Beat, no_beat

Shapes = dict[str, tuple[int, ...]]

BLOCK_EXAMPLES = 1024
"""Laid out together; bounds the time of packing, which grows faster than its input."""


@dataclass(frozen=True)
class Scores:
    """Figures of a split by name; `loss_by_source` by the names of its sources, where there are
    several.
    """

    figures: dict[str, float]
    loss_by_source: Mapping[str, float] = field(default_factory=dict)

    def after(self, step: int, examples: int) -> EvalMetrics:
        """The record of a run's evaluation."""
        return EvalMetrics(step, examples, dict(self.figures), dict(self.loss_by_source))


def evaluate(runner: ModelRunner, split: TokenizedSplit, beat: Beat = no_beat) -> Scores:
    """Scores of the model as it is now; all ranks share the work and get the same answer."""
    return evaluate_groups(runner, split, 1, beat)[0]


@torch.no_grad()
def evaluate_groups(
    runner: ModelRunner, split: TokenizedSplit, groups: int, beat: Beat
) -> list[Scores]:
    """Scores of each of several models that share one runner.

    Every batch holds the rows `groups` times, and the g-th copy is the g-th model's.
    """
    everything = np.arange(len(split))
    runner = replace(
        runner,
        micro_tokens=max(1, runner.micro_tokens // groups),
        objective=runner.objective.over(split, everything, runner),
    )
    sources = _sources(split)
    found = [_sums(runner, split, own, groups, beat) for own in sources.values()]
    shapes = found[0][1]
    summed_SGK = runner.strategy.sum(torch.stack([sums for sums, _ in found])).cpu().numpy()
    known_of_all = _known(runner, split, everything)
    of_sources = [_known(runner, split, own) for own in sources.values()]
    scores = []
    for sums_SK in summed_SGK.swapaxes(0, 1):
        sums = _named(shapes, sums_SK.sum(0)) | known_of_all
        losses = {
            name: LOSS.of(_named(shapes, sums_K) | known)
            for name, sums_K, known in zip(sources, sums_SK, of_sources, strict=True)
        }
        figures = {figure.name: figure.of(sums) for figure in runner.figures}
        scores.append(Scores(figures, losses if len(sources) > 1 else {}))
    return scores


@torch.no_grad()
def label_values(
    runner: ModelRunner,
    split: TokenizedSplit,
    examples: Indices,
    of: Callable[[MicroBatch], Tensor],
    beat: Callable[[], object] = lambda: None,
) -> npt.NDArray[np.float64]:
    """`[K, label tokens]` of these examples in the order of the split, where `of` gives `[K, N]` of
    a batch; all ranks share the work and get all. `beat` is called after every pass.
    """
    numbers = parts_of(examples, split.parts)
    counts_Q = np.diff(split.part_labels)[numbers]
    firsts = dict(zip(numbers.tolist(), (np.cumsum(counts_Q) - counts_Q).tolist(), strict=True))
    found_KN: npt.NDArray[np.float64] | None = None
    for start in range(0, len(examples), BLOCK_EXAMPLES):
        indices = examples[start : start + BLOCK_EXAMPLES]
        own = parts_of(indices, split.parts)
        for rows in runner.layout(split, indices):
            batch = runner.collate(split, indices, rows)
            values_Kn = of(batch).double().cpu().numpy()
            if found_KN is None:
                found_KN = np.zeros((len(values_Kn), int(counts_Q.sum())))
            at = 0
            for span, count in zip(batch.spans, batch.labels, strict=True):
                first = firsts[int(own[span.sequence])]
                found_KN[:, first : first + count] = values_Kn[:, at : at + count]
                at += count
            beat()
    assert found_KN is not None
    # Exact, since all but one of the addends are 0.
    summed_KN = runner.strategy.sum(torch.from_numpy(found_KN).to(runner.strategy.device))
    return np.asarray(summed_KN.cpu().numpy())


def _sources(split: TokenizedSplit) -> dict[str, Indices]:
    """The examples of each source that has any; of a split without sources all, under ""."""
    numbers = split.source_numbers
    if numbers is None:
        return {"": np.arange(len(split))}
    own = {name: np.flatnonzero(numbers == number) for number, name in enumerate(split.sources)}
    return {name: indices for name, indices in own.items() if len(indices)}


def _sums(
    runner: ModelRunner, split: TokenizedSplit, examples: Indices, groups: int, beat: Beat
) -> tuple[Tensor, Shapes]:
    """`[G, K]`, the columns summed over these examples on this rank, one after another; and the
    shape of each sum.
    """
    objective, sums_GK, shapes = runner.objective, None, Shapes()
    for start in range(0, len(examples), BLOCK_EXAMPLES):
        indices = examples[start : start + BLOCK_EXAMPLES]
        layout = runner.layout(split, indices)
        beat(0, len(layout))
        for number, rows in enumerate(layout, start=1):
            batch = runner.collate(split, indices, rows).repeated(groups)
            columns = objective.columns(runner, batch, groups)
            sums = {name: values.double().sum(1) for name, values in columns.all.items()}
            shapes = {name: values.shape[1:] for name, values in sums.items()}
            batch_GK = torch.cat([values.reshape(groups, -1) for values in sums.values()], 1)
            sums_GK = batch_GK if sums_GK is None else sums_GK + batch_GK
            beat(number, len(layout))
    assert sums_GK is not None
    return sums_GK, shapes


def _named(shapes: Shapes, sums_K: npt.NDArray[np.float64]) -> dict[str, Any]:
    """The sums by the names of their columns."""
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
    parts = np.split(sums_K, ends)
    named = zip(shapes.items(), parts, strict=True)
    return {name: part.reshape(shape) for (name, shape), part in named}


def _known(runner: ModelRunner, split: TokenizedSplit, indices: Indices) -> dict[str, Any]:
    """The sums of the columns that depend on the data alone."""
    return {name: each.sum() for name, each in runner.objective.known(split, indices).items()}
