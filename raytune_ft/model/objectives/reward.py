"""A reward model: one number for an answer, learnt from which of two is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy.typing as npt
from torch import Tensor
from torch.nn import functional as F

from raytune_ft.config.preference import RewardModelConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.formats.preference import MARGIN
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.objectives.base import (
    Columns,
    Forward,
    Objective,
    TeacherOf,
    weighted_examples,
    weighted_losses,
)
from raytune_ft.model.objectives.preference import half_right


@dataclass(frozen=True)
class Reward(Objective):
    """The model of Bradley and Terry on the numbers of a head: -log sigmoid(chosen - rejected -
    margin), where a margin is a column of the data (arXiv 2307.09288, sec. 3.2.2).

    Such rewards are known up to a constant. `center_rewards_coefficient` holds the sum of a pair
    near 0 (arXiv 2312.09244).
    """

    of_tokens: ClassVar[bool] = False
    settings: RewardModelConfig

    def losses(self, forward: Forward, batch: MicroBatch) -> Tensor:
        """`[E]`, one for each pair, float64."""
        return self._weighted(*rewards(forward, batch), batch.columns)

    def columns(self, forward: Forward, batch: MicroBatch, groups: int) -> Columns:
        """See `columns_of`."""
        assert groups == 1, "every model has a head of its own"
        return Columns.of_one(self.columns_of(*rewards(forward, batch), batch.columns))

    def columns_of(
        self, chosen_E: Tensor, rejected_E: Tensor, columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """`[E]` each, from the rewards of the answers and the data columns of the same pairs."""
        return {
            "loss": self._weighted(chosen_E, rejected_E, columns),
            "preferred": half_right(chosen_E, rejected_E),
            "margin": chosen_E - rejected_E,
        }

    def known(self, split: TokenizedSplit, indices: Indices) -> dict[str, npt.NDArray[Any]]:
        """See `weighted_examples`."""
        return weighted_examples(split, indices)

    def _weighted(
        self, chosen_E: Tensor, rejected_E: Tensor, columns: Mapping[str, Tensor]
    ) -> Tensor:
        gap_E = chosen_E - rejected_E
        if MARGIN in columns:
            gap_E = gap_E - columns[MARGIN][:, 0]
        losses_E = -F.logsigmoid(gap_E)
        if self.settings.center_rewards_coefficient:
            middle_E = (chosen_E + rejected_E).square()
            losses_E = losses_E + self.settings.center_rewards_coefficient * middle_E
        return weighted_losses(losses_E, columns)


def rewards(forward: Forward, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """`[E]` float64 each: the head's numbers of chosen and rejected answers."""
    assert batch.members_PE is not None
    chosen_E, rejected_E = forward.example_logits(batch)[:, 0].double()[batch.members_PE]
    return chosen_E, rejected_E


def reward(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Reward:
    """`train.objective: reward`."""
    return Reward(train.reward)
