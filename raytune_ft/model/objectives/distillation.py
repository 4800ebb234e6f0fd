"""A teacher's distribution over tokens, learnt beside the labels (arXiv 1503.02531, 2306.08543)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from raytune_ft.config.train import KdConfig
from raytune_ft.data.batch import MicroBatch
from raytune_ft.model.loss import token_losses
from raytune_ft.model.objectives.base import Forward
from raytune_ft.model.objectives.tokens import TokenObjective

Teacher = Callable[[MicroBatch], Tensor]
"""`logits_NV` of a frozen model at the label positions."""


@dataclass(frozen=True, kw_only=True)
class Distillation(TokenObjective):
    """(1 - weight) x cross entropy + weight x temperature^2 x divergence, for each label token.

    Evaluations are of the cross entropy alone, so that teachers and temperatures compare.
    """

    settings: KdConfig
    teacher: Teacher

    def losses(self, model: Forward, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """See `Objective.losses`."""
        share = self.settings.weight
        labels_N = token_losses(outputs, batch, self.label_smoothing)
        kl_N = divergence(outputs, self.teacher(batch).to(outputs.dtype), self.settings)
        return self.weighted((1 - share) * labels_N + share * kl_N, batch)


def divergence(student_NV: Tensor, teacher_NV: Tensor, settings: KdConfig) -> Tensor:
    """`[N]`: of the two softened distributions, times the square of the temperature."""
    student_NV = (student_NV / settings.temperature).log_softmax(-1)
    teacher_NV = (teacher_NV / settings.temperature).log_softmax(-1)
    if settings.divergence == "reverse":
        student_NV, teacher_NV = teacher_NV, student_NV
    kl_N = F.kl_div(student_NV, teacher_NV, log_target=True, reduction="none").sum(-1)
    return kl_N * settings.temperature**2
