"""PPO: completions that the model said itself, whose tokens a critic weighs.

Shapes: E completions, N label tokens, which are those of completions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raytune_ft.config.rollouts import PpoConfig, RolloutConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.objectives.base import (
    Forward,
    Objective,
    TeacherOf,
    weighted_examples,
    weighted_tokens,
)
from raytune_ft.model.objectives.policy import ADVANTAGE, SAMPLED
from raytune_ft.model.objectives.preference import logps_of

VALUE, RETURN = "value", "return"
"""Label columns: what the critic gave a token when it was sampled, and what it should have."""


def logps_and_values(
    forward: Forward, batch: MicroBatch, temperature: float
) -> tuple[Tensor, Tensor]:
    """`[N]` each, from one pass: the log-probability of every label token, and the value of the
    state that it was chosen in.
    """
    logps_N1, values_N = forward.with_values(batch, logps_of(temperature))
    return logps_N1[:, 0], values_N


@dataclass(frozen=True, kw_only=True)
class Ppo(Objective):
    """PPO with clipped ratios and clipped values (arXiv 1707.06347; of values as in TRL).

    The data are a rollout with the label columns `sampled`, `advantage`, `value` and `return`. The
    losses are divided by the label tokens of the step.
    """

    of_tokens: ClassVar[bool] = True
    settings: PpoConfig
    rollout: RolloutConfig

    def count(self, split: TokenizedSplit, indices: Indices) -> float:
        """Label tokens times the weights of their completions."""
        own_E = weighted_examples(split, indices)["counted"]
        return float((own_E * split.labels_of(indices)).sum())

    def losses(self, forward: Forward, batch: MicroBatch) -> Tensor:
        """`[N]`, one for each token of a completion, float64."""
        return self.losses_of(*logps_and_values(forward, batch, self.rollout.temperature), batch)

    def losses_of(self, logps_N: Tensor, values_N: Tensor, batch: MicroBatch) -> Tensor:
        """The same from log-probabilities at the temperature of sampling, and values."""
        own = self.settings
        sampled_N, advantage_N, before_N, return_N = (
            batch.label_columns[name].double() for name in (SAMPLED, ADVANTAGE, VALUE, RETURN)
        )
        ratio_N = (logps_N.double() - sampled_N).exp()
        clipped_N = ratio_N.clamp(1 - own.cliprange, 1 + own.cliprange)
        losses_N = -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
        wide_N = values_N.double()
        errors_N = (wide_N - return_N).square()
        if own.cliprange_value is not None:
            low_N, high_N = before_N - own.cliprange_value, before_N + own.cliprange_value
            near_N = torch.clamp(wide_N, low_N, high_N)
            errors_N = torch.maximum(errors_N, (near_N - return_N).square())
        weighted_N: Tensor = weighted_tokens(losses_N + own.vf_coef * 0.5 * errors_N, batch)
        return weighted_N


def ppo(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Ppo:
    """`train.objective: ppo`."""
    return Ppo(settings=train.ppo, rollout=train.rollout)
