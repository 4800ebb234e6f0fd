"""What is optimised: one function per objective, one dict entry.

Formats and keys that go with an objective stand in `config.objectives`.
"""

from __future__ import annotations

from collections.abc import Callable

from raytune_ft.config.train import TrainConfig
from raytune_ft.data.prepare import PreparedData
from raytune_ft.model.objectives.base import Forward, Objective
from raytune_ft.model.objectives.classification import Classification, class_weights
from raytune_ft.model.objectives.distillation import Distillation, Teacher
from raytune_ft.model.objectives.tokens import TokenObjective, relative_rationale_weight

__all__ = ["OBJECTIVES", "Forward", "Objective", "Teacher", "TokenObjective"]

TeacherOf = Callable[[], Teacher]


def _sft(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Objective:
    return TokenObjective(train.label_smoothing)


def _clm(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Objective:
    return TokenObjective(train.label_smoothing, perplexity=True)


def _classification(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Objective:
    problem, labels = data.report.problem, data.report.labels
    assert problem is not None
    weights = class_weights(train.class_weights, problem, labels, data.train)
    return Classification(problem, weights, train.label_smoothing)


def _rationale(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Objective:
    weight = relative_rationale_weight(data.train, train.rationale_weight)
    return TokenObjective(train.label_smoothing, rationale_weight=weight)


def _kd(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Objective:
    assert train.kd is not None
    return Distillation(train.label_smoothing, settings=train.kd, teacher=teacher_of())


OBJECTIVES: dict[str, Callable[[TrainConfig, PreparedData, TeacherOf], Objective]] = {
    "sft": _sft,
    "clm": _clm,
    "classification": _classification,
    "rationale": _rationale,
    "kd": _kd,
}
