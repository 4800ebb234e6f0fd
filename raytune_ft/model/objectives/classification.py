"""Classes or numbers for whole examples, from a head on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.formats.classification import TARGET
from raytune_ft.data.order import Indices
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError
from raytune_ft.model.objectives.base import Forward, Sums, columns_at, example_weights

BINS = 10


@dataclass(frozen=True)
class Classification:
    """One loss an example. `class_weights` has one for each label, all 1 where none is written."""

    of_tokens: ClassVar[bool] = False
    problem: str
    class_weights: tuple[float, ...]
    label_smoothing: float = 0.0

    def count(self, split: TokenizedSplit, indices: Indices) -> float:
        """Examples, each with its weight and, for a single label, that of its class."""
        return float(self.weights(columns_at(split, indices), np.ones_like).sum())

    def outputs(self, model: Forward, batch: MicroBatch) -> Tensor:
        """`logits_EL`."""
        return model.example_logits(batch)

    def losses(self, model: Forward, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """`[E]`, weighted."""
        target_EL = batch.columns[TARGET].to(outputs.dtype)
        losses_E = self.unweighted(outputs, target_EL, self.label_smoothing)
        return losses_E * self.weights(batch.columns, torch.ones_like).to(losses_E.dtype)

    def unweighted(self, outputs: Tensor, target_EL: Tensor, smoothing: float = 0.0) -> Tensor:
        """`[E]`, as the heads of transformers have it: the mean over labels of an example."""
        if self.problem == "regression":
            return (outputs - target_EL).square().mean(1)
        if self.problem == "multi_label":
            each_EL = F.binary_cross_entropy_with_logits(outputs, target_EL, reduction="none")
            return (each_EL * each_EL.new_tensor(self.class_weights)).mean(1)
        classes_E = target_EL.argmax(1)
        return F.cross_entropy(outputs, classes_E, reduction="none", label_smoothing=smoothing)

    def weights(self, columns: Mapping[str, Any], ones_like: Any) -> Any:
        """`[E]`, of each example and of its class, of numpy arrays and of tensors alike."""
        target_EL = columns[TARGET]
        weights_E = example_weights(columns)
        if weights_E is None:
            weights_E = ones_like(target_EL[:, 0])
        if self.problem != "single_label" or set(self.class_weights) == {1.0}:
            return weights_E
        own = np.array(self.class_weights, np.float32)
        classes_L = target_EL.new_tensor(own) if isinstance(target_EL, Tensor) else own
        return weights_E * (target_EL * classes_L).sum(1)

    def sums(self, outputs: Tensor, batch: MicroBatch, groups: int) -> Tensor:
        """`[1, K]`: the weighted loss, the weights, and counts that all figures follow from."""
        assert groups == 1, "every model has a head of its own"
        outputs = outputs.double()
        target_EL = batch.columns[TARGET].double()
        weights_E = self.weights(batch.columns, torch.ones_like).double()
        losses_E = self.unweighted(outputs, target_EL)
        first = torch.stack([(losses_E * weights_E).sum(), weights_E.sum()])
        if self.problem == "regression":
            moments = (
                target_EL,
                outputs,
                target_EL.square(),
                outputs.square(),
                target_EL * outputs,
            )
            return torch.cat([first, *(each.sum(0) for each in moments)]).unsqueeze(0)
        guess_EL = guessed(outputs, self.problem)
        right_E = (guess_EL == target_EL).all(1).double()
        hits_L, guesses_L, wanted_L = (
            each.sum(0) for each in (guess_EL * target_EL, guess_EL, target_EL)
        )
        gaps_b = outputs.new_zeros(BINS)
        if self.problem == "single_label":
            sure_E = outputs.softmax(1).amax(1)
            bins_E = (sure_E * BINS).long().clamp_max(BINS - 1)
            gaps_b.index_add_(0, bins_E, sure_E - right_E)
        parts = [first, right_E.sum().unsqueeze(0), hits_L, guesses_L, wanted_L, gaps_b]
        return torch.cat(parts).unsqueeze(0)

    def figures(self, sums_K: Sums, split: TokenizedSplit, indices: Indices) -> dict[str, float]:
        """See `Objective.figures`. Of several labels, accuracy is that all of them are right."""
        n, labels = len(indices), len(self.class_weights)
        figures = {"eval_loss": float(sums_K[0] / sums_K[1])}
        if self.problem == "regression":
            return figures | _regression(sums_K[2:].reshape(5, labels), n)
        right, rest = sums_K[2], sums_K[3:]
        figures["eval_accuracy"] = float(right / n)
        hits, guesses, wanted = rest[: 3 * labels].reshape(3, labels)
        figures["eval_macro_f1"] = macro_f1(hits, guesses, wanted)
        if self.problem == "single_label":
            figures["eval_calibration_error"] = float(np.abs(rest[3 * labels :]).sum() / n)
        return figures


def guessed(outputs: Tensor, problem: str) -> Tensor:
    """`[E, L]`, 1 for the labels that these outputs stand for."""
    if problem == "multi_label":
        return (outputs > 0).double()
    return F.one_hot(outputs.argmax(1), outputs.shape[1]).double()


def macro_f1(hits: Sums, guesses: Sums, wanted: Sums) -> float:
    """Mean of the F1 of the labels that occur, in guesses or references."""
    occurs = guesses + wanted > 0
    return float(np.mean(2 * hits[occurs] / (guesses + wanted)[occurs])) if occurs.any() else 0.0


def _regression(moments: Sums, n: int) -> dict[str, float]:
    """Means over the numbers of an example."""
    y, p, yy, pp, yp = moments / n
    variance, spread = np.maximum(yy - y * y, 0), np.maximum(pp - p * p, 0)
    mse = yy - 2 * yp + pp
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = 1 - mse / variance
        pearson = (yp - y * p) / np.sqrt(variance * spread)
    return {
        "eval_mse": float(mse.mean()),
        "eval_r2": float(r2.mean()),
        "eval_pearson": float(pearson.mean()),
    }


def class_weights(
    written: str | dict[str, float], problem: str, labels: Sequence[str], split: TokenizedSplit
) -> tuple[float, ...]:
    """One for each label.

    Balanced is scikit-learn's: examples over labels times the examples of a label.

    Raises:
        ConfigError: a label is written that there is not, or none counts at all.
    """
    if written == "none" or problem == "regression":
        return (1.0,) * len(labels)
    if isinstance(written, dict):
        unknown = [name for name in written if name not in labels]
        if unknown:
            raise ConfigError(
                f"train.class_weights.{unknown[0]}",
                "is the weight of no label of data.train",
                f"write one of {', '.join(labels[:12])}",
            )
        weights = tuple(float(written.get(name, 1.0)) for name in labels)
        if not any(weights):
            rule = "is zero for every label, so that nothing is left to learn"
            raise ConfigError(f"train.class_weights={written}", rule, "write one above 0")
        return weights
    counts_L = split.columns[TARGET].astype(np.float64).sum(0)
    balanced = len(split) / (len(labels) * np.maximum(counts_L, 1))
    return tuple(balanced.tolist())
