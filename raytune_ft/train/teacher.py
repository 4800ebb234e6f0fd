"""The frozen model that a run learns from: in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.prepare import PreparedData
from raytune_ft.errors import ModelError
from raytune_ft.model.build import build_frozen, load_model_config, load_tokenizer, pad_token
from raytune_ft.model.objectives import Teacher
from raytune_ft.strategy import Strategy
from raytune_ft.train.engine import Engine


def teacher_of(config: Config, data: PreparedData, strategy: Strategy) -> Teacher:
    """Raises ModelError where it cannot be loaded, or is of another vocabulary."""
    settings = config.train.kd
    assert settings is not None
    model = teacher_model(config)
    built = build_frozen(model, config.train.precision).to(strategy.device)
    return InMemory(built, config, strategy)


def teacher_model(config: Config) -> ModelConfig:
    """The teacher as `model` would say it; it is loaded as the student is."""
    assert config.train.kd is not None
    return config.model.model_copy(update={"path": config.train.kd.teacher, "revision": None})


def check_teacher(config: Config) -> None:
    """Raises ModelError where the teacher is no model, or its tokens are not the student's."""
    if config.train.kd is None:
        return
    model = teacher_model(config)
    sizes = [load_model_config(one).get_text_config().vocab_size for one in (config.model, model)]
    words = [load_tokenizer(one).get_vocab() for one in (config.model, model)]
    if sizes[0] != sizes[1] or words[0] != words[1]:
        raise ModelError(
            f"train.kd.teacher={model.path}",
            f"has another vocabulary ({sizes[1]:,} tokens) than model.path ({sizes[0]:,}), so that "
            "their distributions cannot be compared",
            "write a teacher of the student's family",
        )


class InMemory:
    """Runs on the rows of the student, one example to a row where they share one.

    So no probe of the teacher is needed, and the student may be packed.
    """

    def __init__(self, model: nn.Module, config: Config, strategy: Strategy) -> None:
        base: Any = model
        self._engine = Engine(
            model=model,
            wrapped=model,
            head=base.get_output_embeddings(),
            names=[],
            strategy=strategy,
            precision=config.train.precision,
            pad_token=pad_token(load_tokenizer(config.model)),
            micro_tokens=0,
            packing=False,
        )

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Tensor:
        """`logits_NV` at the label positions of the batch, in its order."""
        return self._engine.logits(batch.unpacked(self._engine.pad_token))
