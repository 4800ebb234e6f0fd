"""KTO: a loss for each answer that is said to be desirable or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytune_ft.config.preference import KtoConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.formats.example import DESIRABLE
from raytune_ft.data.prepared import REFERENCE, PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError, RunFailed
from raytune_ft.model.objectives.base import (
    Columns,
    Forward,
    Objective,
    TeacherOf,
    weighted_examples,
    weighted_losses,
)
from raytune_ft.model.objectives.preference import label_logps


@dataclass(frozen=True)
class Kto(Objective):
    """Kahneman-Tversky optimisation (arXiv 2402.01306, eq. 7); `apo_zero_unpaired`: arXiv
    2408.06266.

    `kl` is the mean log ratio to the reference over the partners of all examples of a step, at
    least 0 and without a gradient. It is computed before the losses of the step, in passes of its
    own, and so does not depend on how the step is cut into micro-batches.
    """

    of_tokens: ClassVar[bool] = True
    settings: KtoConfig
    kl: Tensor | float = 0.0

    def over(self, split: TokenizedSplit, indices: Indices, forward: Forward) -> Kto:
        """With the KL of these examples. Raises RunFailed where the data have no partners."""
        if self.settings.loss_type != "kto":
            return self
        if split.partners is None:
            raise RunFailed("the data hold no partners for the KL of KTO")
        total = forward.summed(split.partners, indices, lambda batch: ratios(forward, batch).sum())
        return replace(self, kl=(total / len(indices)).clamp_min(0))

    def losses(self, forward: Forward, batch: MicroBatch) -> Tensor:
        """`[E]`, one for each answer, float64."""
        return self._losses(ratios(forward, batch), batch)

    def _losses(self, ratios_E: Tensor, batch: MicroBatch) -> Tensor:
        own, good_E = self.settings, batch.columns[DESIRABLE][:, 0] > 0
        sign_E = torch.where(good_E, 1.0, -1.0)
        factor_E = torch.where(good_E, own.desirable_weight, own.undesirable_weight)
        losses_E = factor_E * (1 - (sign_E * own.beta * (ratios_E - self.kl)).sigmoid())
        return weighted_losses(losses_E, batch.columns)

    def columns(self, forward: Forward, batch: MicroBatch, groups: int) -> Columns:
        """`[1, E]` each."""
        assert groups == 1, "the KL is that of one model"
        ratios_E = ratios(forward, batch)
        good_E = batch.columns[DESIRABLE][:, 0].double()
        rewards_E = self.settings.beta * ratios_E
        found = {
            "loss": self._losses(ratios_E, batch),
            "good_reward": rewards_E * good_E,
            "bad_reward": rewards_E * (1 - good_E),
            "kl": torch.zeros_like(ratios_E) + self.kl,
        }
        return Columns.of_one(found)

    def known(self, split: TokenizedSplit, indices: Indices) -> dict[str, npt.NDArray[Any]]:
        """Examples, what the loss counts of them, and on which side they are."""
        good_E = split.columns[DESIRABLE][indices, 0].astype(np.float64)
        return {**weighted_examples(split, indices), "good": good_E, "bad": 1 - good_E}


def ratios(forward: Forward, batch: MicroBatch) -> Tensor:
    """`[E]` float64, the log-probability of each answer minus that under the reference.

    Raises:
        RunFailed: the data have no reference.
    """
    if REFERENCE not in batch.label_columns:
        raise RunFailed("the data hold no log-probabilities of the reference")
    ratio_N = label_logps(forward, batch).double() - batch.label_columns[REFERENCE].double()
    sums_E = torch.zeros(len(batch.spans), dtype=torch.float64, device=ratio_N.device)
    return sums_E.index_add(0, batch.owners_N, ratio_N)


def kto(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Kto:
    """`train.objective: kto`. Raises ConfigError where all answers are on one side."""
    good = int((data.train.columns[DESIRABLE][:, 0] > 0).sum())
    for side, count in (("desirable", good), ("undesirable", len(data.train) - good)):
        if count == 0:
            raise ConfigError(
                "train.objective=kto",
                f"needs both kinds of answers, and data.train has no {side} one of "
                f"{len(data.train):,}",
                "add some, or write train.objective: sft",
            )
    return Kto(train.kto)
