"""The order in which a run sees its examples: its mix of sources, and its curriculum."""

from __future__ import annotations

import numpy as np

from raytune_ft.config.data import CurriculumConfig
from raytune_ft.config.schema import Config
from raytune_ft.data.mixture import quotas_of
from raytune_ft.data.order import Curriculum, Indices, Numbers, Order, members_of, ranked
from raytune_ft.data.prepare import PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import RunFailed
from raytune_ft.train.optim import total_examples


def plain_order(config: Config, split: TokenizedSplit) -> Order:
    """The mix over the training split, without a curriculum.

    Raises:
        ConfigError: a source has no place in it.
    """
    quotas = quotas_of(config.data, split)
    return Order(config.seed, members_of(split, len(quotas)), quotas)


def order_of(config: Config, data: PreparedData) -> Order:
    """The stream of a run.

    Raises:
        ConfigError: see `plain_order`.
        RunFailed: nobody has measured the losses that the curriculum goes by.
    """
    plain, settings = plain_order(config, data.train), config.data.curriculum
    if settings is None:
        return plain
    total = total_examples(config.train, len(plain))
    found = _curriculum(settings, plain.members, _difficulty(settings, data), total)
    return Order(plain.seed, plain.members, plain.quotas, found)


def _curriculum(
    settings: CurriculumConfig, members: tuple[Indices, ...], difficulty: Numbers, total: int
) -> Curriculum:
    return Curriculum(
        ranked(members, difficulty, settings.order == "hard_first"),
        settings.schedule,
        settings.start,
        round(settings.until * total),
    )


def _difficulty(settings: CurriculumConfig, data: PreparedData) -> Numbers:
    """`[n]` of the training split."""
    if settings.by == "length":
        return data.train.lengths.astype(np.float64)
    if settings.by == "column":
        return data.train.columns["difficulty"][:, 0].astype(np.float64)
    if data.base_loss is None:
        raise RunFailed(f"{data.path} holds no losses of the base, which the curriculum goes by")
    return data.base_loss.astype(np.float64)
