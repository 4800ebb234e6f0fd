"""Knowledge distillation: a teacher's distribution over tokens is learnt beside the labels (arXiv
1503.02531; reverse KL: arXiv 2306.08543).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from raytune_ft.config.train import KdConfig, TrainConfig
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.prepared import PreparedData
from raytune_ft.model.objectives.base import Forward, Teacher, TeacherOf
from raytune_ft.model.objectives.tokens import TokenObjective, token_losses


@dataclass(frozen=True, kw_only=True)
class Distillation(TokenObjective):
    """(1 - weight) x cross entropy + weight x temperature^2 x divergence, for each label token.

    Evaluations measure the cross entropy alone, so that runs with different teachers and
    temperatures can be compared. The teacher is not called in them.
    """

    settings: KdConfig
    teacher: Teacher

    def losses(self, forward: Forward, batch: MicroBatch) -> Tensor:
        """`[N]`, one for each label token. All logits of both models are there at a time."""
        outputs, share = forward.logits(batch), self.settings.weight
        labels_N = token_losses(outputs, batch, self.label_smoothing)
        kl_N = divergence(outputs, self.teacher(batch).to(outputs.dtype), self.settings)
        return self.weighted((1 - share) * labels_N + share * kl_N, batch)


def distillation(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Distillation:
    """`kd`; loads the teacher."""
    assert train.kd is not None
    return Distillation(train.label_smoothing, settings=train.kd, teacher=teacher_of())


def divergence(student_NV: Tensor, teacher_NV: Tensor, settings: KdConfig) -> Tensor:
    """`[N]`, KL between the two softened distributions, times the square of the temperature."""
    student_NV = (student_NV / settings.temperature).log_softmax(-1)
    teacher_NV = (teacher_NV / settings.temperature).log_softmax(-1)
    if settings.divergence == "reverse":
        student_NV, teacher_NV = teacher_NV, student_NV
    kl_N = F.kl_div(student_NV, teacher_NV, log_target=True, reduction="none").sum(-1)
    return kl_N * settings.temperature**2
