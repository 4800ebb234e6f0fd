"""GRPO and its family: completions that the model said itself, weighed by their advantages.

Shapes: E completions, N label tokens, which are those of completions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raytune_ft.config.rollouts import GrpoConfig, RolloutConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.prepared import REFERENCE, PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.objectives.base import (
    Forward,
    OfLogps,
    TeacherOf,
    weighted_examples,
    weighted_tokens,
)
from raytune_ft.model.objectives.preference import label_logps

ADVANTAGE, COUNTED = "advantage", "counted"
"""Columns of a rollout: how much better a completion is than its group, and whether it counts."""
SAMPLED = "sampled"
"""The label column of the log-probabilities under the policy that sampled."""
IMPORTANCE = "importance"
"""The label column of weights of tokens, where a copy sampled that computes a bit otherwise."""


def needs_sampled(grpo: GrpoConfig, rollout: RolloutConfig) -> bool:
    """Whether the data have `sampled`. Else a step is taken with the policy that sampled."""
    in_reward = grpo.beta > 0 and grpo.kl == "reward"
    return rollout.steps > 1 or in_reward or weighs_copies(grpo, rollout)


def weighs_copies(grpo: GrpoConfig, rollout: RolloutConfig) -> bool:
    """Whether the data have `importance`."""
    return rollout.on_vllm and grpo.vllm_importance_sampling_clip_max is not None


@dataclass(frozen=True, kw_only=True)
class Grpo(OfLogps):
    """GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), GSPO (2507.18071) and
    CISPO (2506.13585).

    The data are a rollout: `advantage` and `counted` of each completion and, where several steps
    are taken on it, `sampled`; `reference` under a KL term in the loss; `importance` where copies
    of the model sampled. Everything that a loss is divided by is counted over the step.
    """

    of_tokens: ClassVar[bool] = True
    settings: GrpoConfig
    rollout: RolloutConfig

    def count(self, split: TokenizedSplit, indices: Indices) -> float:
        """Label tokens; of grpo completions; of dr_grpo completions times the longest one."""
        own_E = weighted_examples(split, indices)["counted"]
        if self.settings.loss_type in ("dapo", "cispo"):
            return float((own_E * split.labels_of(indices)).sum())
        counted = float((own_E * split.columns[COUNTED][indices, 0]).sum())
        if self.settings.loss_type == "dr_grpo":
            return counted * self.rollout.max_completion_length
        return counted

    @property
    def temperature(self) -> float:
        return self.rollout.temperature

    def losses(self, forward: Forward, batch: MicroBatch) -> Tensor:
        """`[N]`, one for each token of a completion, float64."""
        return self.losses_of(label_logps(forward, batch, self.temperature), batch)

    def losses_of(self, logps_N: Tensor, batch: MicroBatch) -> Tensor:
        own, owners_N = self.settings, batch.owners_N
        wide_N = logps_N.double()
        moves = needs_sampled(self.settings, self.rollout)
        sampled_N = batch.label_columns[SAMPLED].double() if moves else wide_N.detach()
        log_ratio_N = wide_N - sampled_N
        tokens_E = torch.tensor(batch.labels, dtype=torch.float64).clamp_min(1)
        tokens_E = tokens_E.to(wide_N.device, non_blocking=True)
        if own.importance_sampling_level == "sequence":
            sums_E = torch.zeros_like(tokens_E).index_add(0, owners_N, log_ratio_N)
            log_ratio_N = (sums_E / tokens_E).index_select(0, owners_N)
        ratio_N = log_ratio_N.exp()
        advantage_N = batch.columns[ADVANTAGE][:, 0].double().index_select(0, owners_N)
        if own.loss_type == "cispo":
            losses_N = -ratio_N.clamp_max(own.high).detach() * advantage_N * wide_N
        else:
            clipped_N = ratio_N.clamp(1 - own.epsilon, 1 + own.high)
            bounded_N = ratio_N if own.delta is None else ratio_N.clamp_max(own.delta)
            losses_N = -torch.minimum(bounded_N * advantage_N, clipped_N * advantage_N)
        if weighs_copies(self.settings, self.rollout):
            losses_N = losses_N * batch.label_columns[IMPORTANCE].double()
        if own.beta and own.kl == "loss":
            # Schulman's k3, times the ratio, without which its gradient is that of another KL.
            ahead_N = batch.label_columns[REFERENCE].double() - wide_N
            losses_N = losses_N + own.beta * ratio_N * (ahead_N.exp() - ahead_N - 1)
        if own.loss_type == "grpo":
            losses_N = losses_N / tokens_E.index_select(0, owners_N)
        weighted_N: Tensor = weighted_tokens(losses_N, batch)
        return weighted_N


def grpo(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Grpo:
    """`train.objective: grpo`."""
    return Grpo(settings=train.grpo, rollout=train.rollout)
