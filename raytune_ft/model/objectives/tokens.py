"""Objectives over label tokens: cross entropy, and what is built on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.formats.rationale import RATIONALE
from raytune_ft.data.order import Indices
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError
from raytune_ft.model.loss import label_positions, token_losses
from raytune_ft.model.objectives.base import Forward, Sums, columns_at, example_weights

LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class TokenObjective:
    """Cross entropy of label tokens, each weighted as its example is.

    `rationale_weight` is that of a token of a rationale, where examples are of two tasks.
    """

    of_tokens: ClassVar[bool] = True
    label_smoothing: float = 0.0
    rationale_weight: float = 1.0
    perplexity: bool = False

    def count(self, split: TokenizedSplit, indices: Indices) -> float:
        """Label tokens times the weights of their examples."""
        counts_E = split.label_counts[indices]
        weights_E = self._weights(columns_at(split, indices))
        return int(counts_E.sum()) if weights_E is None else float((weights_E * counts_E).sum())

    def outputs(self, model: Forward, batch: MicroBatch) -> Tensor:
        """`logits_NV` at the label positions."""
        return model.logits(batch)

    def losses(self, model: Forward, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """`[N]`, one for each label token."""
        return self.weighted(token_losses(outputs, batch, self.label_smoothing), batch)

    def weighted(self, losses_N: Tensor, batch: MicroBatch) -> Tensor:
        """Each times the weight of its example."""
        weights_E = self._weights(batch.columns)
        if weights_E is None:
            return losses_N
        return losses_N * batch.by_token(weights_E)[label_positions(batch)].to(losses_N.dtype)

    def sums(self, outputs: Tensor, batch: MicroBatch, groups: int) -> Tensor:
        """`[G, 3]`: loss, right tokens and wholly right examples."""
        once = batch if groups == 1 else batch.part(groups)
        owners_N = once.owners_BS()[label_positions(once)]
        examples = [span.example for span in once.spans]
        losses_GN = self.weighted(token_losses(outputs, batch), batch).view(groups, -1)
        right_GN = (outputs.argmax(-1) == batch.targets_BS[label_positions(batch)]).view(groups, -1)
        wrong_GE = right_GN.new_zeros(groups, max(examples, default=0) + 1, dtype=torch.int64)
        wrong_GE.index_add_(1, owners_N, (~right_GN).long())
        exact_G = (wrong_GE[:, examples] == 0).sum(1)
        return torch.stack([losses_GN.double().sum(1), right_GN.sum(1), exact_G], 1)

    def figures(self, sums_K: Sums, split: TokenizedSplit, indices: Indices) -> dict[str, float]:
        """Each sum divided once.

        `eval_exact_match` is the share of examples of which every label token is the likeliest
        given the reference before it; that is when greedy decoding reproduces the completion.
        """
        loss, right, exact = sums_K.tolist()
        eval_loss = loss / self.count(split, indices)
        figures = {
            "eval_loss": eval_loss,
            "eval_token_accuracy": right / int(split.label_counts[indices].sum()),
            "eval_exact_match": exact / len(indices),
        }
        if self.perplexity:
            figures["eval_perplexity"] = math.exp(min(eval_loss, LARGEST_EXPONENT))
        return figures

    def _weights(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        """Of numpy arrays and of tensors alike."""
        weights_E: Tensor | None = example_weights(columns)
        if RATIONALE not in columns:
            return weights_E
        tasks_E = 1 + (self.rationale_weight - 1) * columns[RATIONALE][:, 0]
        return tasks_E if weights_E is None else weights_E * tasks_E


def relative_rationale_weight(split: TokenizedSplit, written: float) -> float:
    """What a token of a rationale counts so that the loss is that of arXiv 2305.02301.

    There the mean over answer tokens and `written` times the mean over rationale tokens are added.
    The two means weigh alike where every token counts in proportion to how rare its task is in the
    whole split; divided by the weighted number of tokens, the sum of both is (L_label + written *
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
            "raise data.max_length, or see in data.json what became of the rows",
        )
    return written * answers / rationales
