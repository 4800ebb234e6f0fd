"""Classes or numbers for whole examples, from a head on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from raytune_ft.config.train import TrainConfig
from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.formats.classification import TARGET
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError
from raytune_ft.model.objectives.base import (
    Columns,
    Forward,
    Objective,
    TeacherOf,
    columns_at,
    example_weights,
)

BINS = 10
"""Of the expected calibration error."""


@dataclass(frozen=True)
class Classification(Objective):
    """One loss for each example. `class_weights` has one number for each label, by default 1."""

    of_tokens: ClassVar[bool] = False
    problem: str
    class_weights: tuple[float, ...]
    label_smoothing: float = 0.0

    def count(self, split: TokenizedSplit, indices: Indices) -> float:
        """The sum of the examples' weights, times those of their classes for a single label."""
        return float(self.weights(columns_at(split, indices), np.ones_like).sum())

    def losses(self, forward: Forward, batch: MicroBatch) -> Tensor:
        """`[E]`, weighted."""
        outputs = forward.example_logits(batch)
        target_EL = batch.columns[TARGET].to(outputs.dtype)
        losses_E = self.unweighted(outputs, target_EL, self.label_smoothing)
        return losses_E * self.weights(batch.columns, torch.ones_like).to(losses_E.dtype)

    def unweighted(self, outputs: Tensor, target_EL: Tensor, smoothing: float = 0.0) -> Tensor:
        """`[E]`, as the heads of transformers compute it: the mean over labels of an example."""
        if self.problem == "regression":
            return (outputs - target_EL).square().mean(1)
        if self.problem == "multi_label":
            each_EL = F.binary_cross_entropy_with_logits(outputs, target_EL, reduction="none")
            return (each_EL * _beside(each_EL, self.class_weights)).mean(1)
        classes_E = target_EL.argmax(1)
        return F.cross_entropy(outputs, classes_E, reduction="none", label_smoothing=smoothing)

    def weights(self, columns: Mapping[str, Any], ones_like: Any) -> Any:
        """`[E]`, the weight of each example times that of its class.

        `columns` are numpy arrays or tensors, and `ones_like` is the function of that library.
        """
        target_EL = columns[TARGET]
        weights_E = example_weights(columns)
        if weights_E is None:
            weights_E = ones_like(target_EL[:, 0])
        if self.problem != "single_label" or set(self.class_weights) == {1.0}:
            return weights_E
        own = np.array(self.class_weights, np.float32)
        classes_L = _beside(target_EL, own) if isinstance(target_EL, Tensor) else own
        return weights_E * (target_EL * classes_L).sum(1)

    def columns(self, forward: Forward, batch: MicroBatch, groups: int) -> Columns:
        """See `columns_of`."""
        assert groups == 1, "every model has a head of its own"
        return Columns.of_one(self.columns_of(forward.example_logits(batch), batch.columns))

    def columns_of(self, outputs: Tensor, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`[E]` or `[E, L]` each, from the outputs and the data columns of the same examples.

        The loss is weighted and `counted` has the weights; all else counts examples alike. Of
        several labels, `right` is that all of them are. `gaps` is `[E, BINS]`: confidence minus
        accuracy, in the bin of the confidence.
        """
        outputs, target_EL = outputs.double(), data[TARGET].double()
        weights_E = self.weights(data, torch.ones_like).double()
        losses_E = self.unweighted(outputs, target_EL)
        found = {"loss": losses_E * weights_E, "counted": weights_E}
        if self.problem == "regression":
            return found | {
                "squared_error": (outputs - target_EL).square().mean(1),
                "target": target_EL,
                "output": outputs,
                "target_squared": target_EL.square(),
                "output_squared": outputs.square(),
                "product": target_EL * outputs,
            }
        wanted_EL, guess_EL = target_EL > 0, guessed(outputs, self.problem)
        right_E = (guess_EL == wanted_EL).all(1)
        found |= {
            "right": right_E,
            "hits": guess_EL & wanted_EL,
            "guesses": guess_EL,
            "wanted": wanted_EL,
        }
        if self.problem == "single_label":
            sure_E = outputs.softmax(1).amax(1)
            bins_E = (sure_E * BINS).long().clamp_max(BINS - 1)
            found["gaps"] = F.one_hot(bins_E, BINS) * (sure_E - right_E.double()).unsqueeze(1)
        return found

    def known(self, split: TokenizedSplit, indices: Indices) -> dict[str, npt.NDArray[Any]]:
        """Every example counts once, except in the loss."""
        return {"examples": np.ones(len(indices))}


def _beside(tensor: Tensor, numbers: Any) -> Tensor:
    """Numbers in the dtype of a tensor and on its device, without waiting for the copy."""
    return torch.as_tensor(numbers, dtype=tensor.dtype).to(tensor.device, non_blocking=True)


def guessed(outputs: Tensor, problem: str) -> Tensor:
    """`[E, L]`, True for the labels that these outputs stand for."""
    if problem == "multi_label":
        return outputs > 0
    return F.one_hot(outputs.argmax(1), outputs.shape[1]).bool()


def classification(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Classification:
    """Raises ConfigError where `train.class_weights` does not go with the labels."""
    problem, labels = data.report.problem, data.report.labels
    assert problem is not None
    weights = class_weights(train.class_weights, problem, labels, data.train)
    return Classification(problem, weights, train.label_smoothing)


def class_weights(
    written: str | dict[str, float], problem: str, labels: Sequence[str], split: TokenizedSplit
) -> tuple[float, ...]:
    """One for each label.

    `balanced` is as in scikit-learn: examples / (labels x examples of the label).

    Raises:
        ConfigError: a label is written that the data do not have, or all weights are 0.
    """
    if written == "none" or problem == "regression":
        return (1.0,) * len(labels)
    if isinstance(written, dict):
        unknown = [name for name in written if name not in labels]
        if unknown:
            raise ConfigError(
                f"train.class_weights.{unknown[0]}",
                "names no label of data.train",
                f"write one of {', '.join(labels[:12])}",
            )
        weights = tuple(float(written.get(name, 1.0)) for name in labels)
        if not any(weights):
            rule = "is 0 for every label, so that no example counts"
            raise ConfigError(f"train.class_weights={written}", rule, "write one above 0")
        return weights
    counts_L = split.columns[TARGET].astype(np.float64).sum(0)
    balanced = len(split) / (len(labels) * np.maximum(counts_L, 1))
    return tuple(balanced.tolist())
