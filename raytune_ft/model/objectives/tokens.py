"""Objectives over label tokens: cross entropy, and what is built on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from raytune_ft.config.train import TrainConfig
from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.formats.rationale import RATIONALE
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError
from raytune_ft.model.heads import wide
from raytune_ft.model.objectives.base import (
    Columns,
    Forward,
    Objective,
    TeacherOf,
    columns_at,
    example_weights,
)

OfLogits = Callable[[Tensor, MicroBatch], Tensor]
"""From `logits_bV` and a batch with these label tokens alone to `[b, K]`, each row by itself."""
BLOCK_LOGITS = 2**28
"""Logits that are there at the same time; 1 GiB in float32, of which a loss needs three."""


def label_logits(
    model: nn.Module, head: nn.Module | None, inputs: Mapping[str, Any], keep_N: Tensor
) -> Tensor:
    """`logits_NV` at the positions `keep_N` of all rows end to end, float32 or wider.

    The head is applied to those positions alone. `head` is the output embedding inside `model`,
    found before a strategy wrapped it. A model that has none, or does not call it, gives logits for
    all positions, and those of `keep_N` are selected.
    """

    def select(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_at(keep_N, arguments[0]), *arguments[1:])

    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    return wide(_at(keep_N, logits) if logits.ndim == 3 else logits)


def label_blocks(
    model: nn.Module,
    head: nn.Module,
    inputs: Mapping[str, Any],
    batch: MicroBatch,
    of: OfLogits,
    rows: int,
) -> Tensor:
    """`of` the logits of all label tokens `[N, K]`, which are never there at the same time.

    The head's own forward computes `of` for blocks of `rows` label tokens, where a strategy has
    gathered its weights, and a backward computes each block's logits again. The model must return
    what its head returns, see `probe.returns_its_head`.
    """
    plain, replaced = head.forward, "forward" in vars(head)

    def block(hidden_bH: Tensor, part: MicroBatch) -> Tensor:
        logits_bV = wide(plain(hidden_bH))
        with torch.autocast(hidden_bH.device.type, enabled=False):
            return of(logits_bV, part)

    def forward(hidden_BSH: Tensor) -> Tensor:
        hidden_NH = _at(batch.labels_N, hidden_BSH)
        starts = range(0, len(hidden_NH), rows)
        parts = [slice(start, start + rows) for start in starts] or [slice(0, 0)]
        return torch.cat(
            [
                checkpoint(block, hidden_NH[part], batch.labelled(part), use_reentrant=False)
                for part in parts
            ]
        )

    head.forward = forward
    try:
        found: Tensor = model(**inputs).logits
    finally:
        if replaced:
            head.forward = plain
        else:
            del head.forward
    return found


def block_rows(vocabulary: int) -> int:
    """Label tokens whose logits are computed together."""
    return max(1, BLOCK_LOGITS // vocabulary)


def _at(places_N: Tensor, values_BSX: Tensor) -> Tensor:
    return values_BSX.flatten(0, 1).index_select(0, places_N)


def token_losses(logits_NV: Tensor, batch: MicroBatch, smoothing: float = 0.0) -> Tensor:
    """Cross entropy `[N]` of every label token."""
    targets_N = batch.targets_N
    return F.cross_entropy(logits_NV, targets_N, reduction="none", label_smoothing=smoothing)


@dataclass(frozen=True)
class TokenObjective(Objective):
    """Cross entropy of label tokens, each with the weight of its example.

    `rationale_weight` is the weight of a token of a rationale, where examples are of two tasks.
    """

    of_tokens: ClassVar[bool] = True
    label_smoothing: float = 0.0
    rationale_weight: float = 1.0

    def losses(self, forward: Forward, batch: MicroBatch) -> Tensor:
        """`[N]`, one for each label token."""
        return forward.by_label(
            batch, lambda logits_bV, part: self.losses_of(logits_bV, part).unsqueeze(1)
        )[:, 0]

    def losses_of(self, logits_NV: Tensor, batch: MicroBatch) -> Tensor:
        """`[N]`, the training losses of label tokens from their logits; of each from its own."""
        return self.weighted(token_losses(logits_NV, batch, self.label_smoothing), batch)

    def values_of(self, logits_NV: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """`[N]` each: the columns of evaluations with a value for each label token."""
        losses_N = self.weighted(token_losses(logits_NV, batch), batch)
        return {"loss": losses_N, "right": logits_NV.argmax(-1) == batch.targets_N}

    def weighted(self, losses_N: Tensor, batch: MicroBatch) -> Tensor:
        """Each times the weight of its example."""
        weights_E = self._weights(batch.columns)
        if weights_E is None:
            return losses_N
        return losses_N * weights_E.index_select(0, batch.owners_N).to(losses_N.dtype)

    def columns(self, forward: Forward, batch: MicroBatch, groups: int) -> Columns:
        """Weighted cross entropy and whether a label token is the likeliest; of an example whether
        all of its label tokens are.

        Each of them is predicted from the reference before it, so `exact` is 1 where greedy
        decoding reproduces the completion.
        """
        once = batch if groups == 1 else batch.group(0, groups)
        names: list[str] = []

        def stacked(logits_bV: Tensor, part: MicroBatch) -> Tensor:
            values = self.values_of(logits_bV, part)
            names[:] = values
            return torch.stack([value.to(logits_bV.dtype) for value in values.values()], 1)

        values_KN = forward.by_label(batch, stacked).T
        rows = {name: row.reshape(groups, -1) for name, row in zip(names, values_KN, strict=True)}
        right_GN = rows["right"] = rows["right"] > 0
        wrong_GQ = right_GN.new_zeros(groups, len(once.spans), dtype=torch.int64)
        wrong_GQ.index_add_(1, once.owners_N, (~right_GN).long())
        members_PE = once.members_PE
        wrong_GE = wrong_GQ if members_PE is None else wrong_GQ[:, members_PE].sum(1)
        return Columns(rows, {"exact": wrong_GE == 0})

    def known(self, split: TokenizedSplit, indices: Indices) -> dict[str, npt.NDArray[Any]]:
        """Label tokens, and what the loss counts of them."""
        tokens_E = split.labels_of(indices)
        weights_E = self._weights(columns_at(split, indices))
        counted_E = tokens_E if weights_E is None else weights_E * tokens_E
        return {"tokens": tokens_E, "counted": counted_E, "examples": np.ones(len(indices))}

    def _weights(self, columns: Mapping[str, Any]) -> Any:
        """`[E]` from columns that are numpy arrays or tensors; None where all weigh the same."""
        weights_E = example_weights(columns)
        if RATIONALE not in columns:
            return weights_E
        tasks_E = 1 + (self.rationale_weight - 1) * columns[RATIONALE][:, 0]
        return tasks_E if weights_E is None else weights_E * tasks_E


def token_objective(
    train: TrainConfig, data: PreparedData, teacher_of: TeacherOf
) -> TokenObjective:
    """`sft` and `clm`."""
    return TokenObjective(train.label_smoothing)


def rationale(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> TokenObjective:
    """Distilling step by step. Raises ConfigError where one of the two tasks has no example."""
    weight = relative_rationale_weight(data.train, train.rationale_weight)
    return TokenObjective(train.label_smoothing, weight)


def relative_rationale_weight(split: TokenizedSplit, written: float) -> float:
    """The weight of a rationale token that makes the loss that of arXiv 2305.02301.

    The paper adds the mean over answer tokens and `written` times the mean over rationale tokens.
    With answers A and rationales R in tokens of the whole split, weighing rationale tokens by
    written * A / R and dividing by the weighted number of tokens gives (L_label + written *
    L_rationale) / (1 + written).

    Raises:
        ConfigError: one of the two has no example.
    """
    rationale_E = split.columns[RATIONALE][:, 0] > 0
    answers = int(split.label_counts[~rationale_E].sum())
    rationales = int(split.label_counts[rationale_E].sum())
    if not (answers and rationales):
        raise ConfigError(
            "train.objective=rationale",
            f"has {answers:,} tokens of answers and {rationales:,} of rationales left to learn",
            "raise data.max_length, or read in data.json which rows were dropped",
        )
    return written * answers / rationales
