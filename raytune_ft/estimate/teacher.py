"""What a worker holds of the model that it learns from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.schema import Config
from raytune_ft.config.train import KdConfig
from raytune_ft.model.load import build_shapes, dtype_of
from raytune_ft.train.distill import teacher_model


@dataclass(frozen=True)
class Teaching:
    """`held` are the bytes of the teacher's weights, 0 where its logits are read from a file.

    What its passes keep for a moment is less than the loss takes afterwards, and is not counted.
    """

    settings: KdConfig
    held: int


def teaching_of(config: Config) -> Teaching | None:
    """None without a teacher. Raises ModelError where it cannot be read."""
    settings = config.train.kd
    if settings is None:
        return None
    if settings.cache == "disk":
        return Teaching(settings, 0)
    model = teacher_model(config)
    with torch.device("meta"):
        shapes = build_shapes(model)
    itemsize = dtype_of(model, LoraMethod(), config.train.precision).itemsize
    return Teaching(settings, itemsize * sum(p.numel() for p in shapes.parameters()))
