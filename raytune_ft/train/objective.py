"""From config and data to the objective of a run, and to the head that it needs."""

from __future__ import annotations

from functools import partial

from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import PreparedData
from raytune_ft.data.report import DataReport
from raytune_ft.model.heads import Head
from raytune_ft.model.objectives import OBJECTIVES, Objective
from raytune_ft.model.objectives.classification import class_weights
from raytune_ft.model.objectives.tokens import relative_rationale_weight
from raytune_ft.strategy import Strategy
from raytune_ft.train.distill import check_size, teacher_of


def head_of(config: Config, report: DataReport) -> Head | None:
    """The task head that the model is built with, None where it predicts tokens."""
    if config.train.objective != "classification":
        return None
    assert report.problem is not None
    return Head(report.problem, report.labels, config.seed)


def head_before(config: Config) -> Head | None:
    """Likewise before the data are read, with two labels where they are not written."""
    if config.train.objective != "classification":
        return None
    return Head(config.data.problem, tuple(config.data.labels or ("0", "1")), config.seed)


def check_objective(config: Config, data: PreparedData) -> None:
    """Raises ConfigError where keys of the objective do not go with the data."""
    if config.train.objective == "classification":
        assert data.report.problem is not None
        written, labels = config.train.class_weights, data.report.labels
        class_weights(written, data.report.problem, labels, data.train)
    elif config.train.objective == "rationale":
        relative_rationale_weight(data.train, config.train.rationale_weight)
    elif config.train.objective == "kd":
        check_size(config, data)


def build_objective(config: Config, data: PreparedData, strategy: Strategy) -> Objective:
    """What this run optimises.

    Raises:
        ConfigError: its keys do not go with the data.
        ModelError: its teacher cannot be loaded, or is of another vocabulary.
    """
    teacher = partial(teacher_of, config, data, strategy)
    return OBJECTIVES[config.train.objective](config.train, data, teacher)
