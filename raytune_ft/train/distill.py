"""The frozen model that a run learns from: in memory, or its logits on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.teacher_logits import first_rows, stored, tensor_of
from raytune_ft.errors import ConfigError, ModelError, RunFailed
from raytune_ft.format import GIB
from raytune_ft.model.hub import reference_model, teacher_model
from raytune_ft.model.lengths import apart_of
from raytune_ft.model.load import (
    build_frozen,
    check_files,
    load_model_config,
    load_tokenizer,
    pad_token,
)
from raytune_ft.model.objectives import Teacher
from raytune_ft.strategy import Strategy
from raytune_ft.train.model_runner import ModelRunner, choose_micro_tokens


def teacher_of(config: Config, data: PreparedData, strategy: Strategy) -> Teacher:
    """The teacher of a run.

    Raises:
        ModelError: it cannot be loaded.
        RunFailed: under `cache: disk` the data hold no logits of it.
    """
    settings = config.train.kd
    assert settings is not None
    if settings.cache == "memory":
        return InMemory(teacher_runner(config, strategy))
    if data.teacher_logits is None:
        raise RunFailed(f"{data.path} holds no logits of {settings.teacher}")
    return Kept(data.teacher_logits, first_rows(data.train), strategy.device)


def teacher_runner(config: Config, strategy: Strategy) -> ModelRunner:
    """A runner for the teacher. Raises ModelError, see `frozen_runner`."""
    return frozen_runner(teacher_model(config), config, strategy)


def frozen_runner(model: ModelConfig, config: Config, strategy: Strategy) -> ModelRunner:
    """A runner for another model, whole on every worker, which is not trained. It does not pack, so
    that packing needs no probe.

    Raises:
        ModelError: it cannot be loaded.
    """
    built: Any = build_frozen(model, config.train.precision)
    return ModelRunner(
        model=built.to(strategy.device),
        wrapped=built,
        head=built.get_output_embeddings(),
        names=[],
        strategy=strategy,
        precision=config.train.precision,
        pad_token=pad_token(load_tokenizer(config.model)),
        micro_tokens=choose_micro_tokens(config.train.micro_tokens, strategy.device),
        packing=False,
        apart=apart_of(built.config),
    )


def check_others(config: Config) -> None:
    """Raises ModelError where a teacher or a reference does not load or has another vocabulary."""
    if config.train.kd is not None:
        why = "so that their distributions cannot be compared"
        _check_beside(config, teacher_model(config), "train.kd.teacher", why)
    if config.train.dpo.reference is not None:
        why = "so that it cannot say how likely an answer is"
        _check_beside(config, reference_model(config), "train.dpo.reference", why)


def _check_beside(config: Config, model: ModelConfig, key: str, why: str) -> None:
    sizes = [load_model_config(config.model).get_text_config().vocab_size]
    words = [load_tokenizer(config.model).get_vocab()]
    try:
        check_files(model)
        sizes.append(load_model_config(model).get_text_config().vocab_size)
        words.append(load_tokenizer(model).get_vocab())
    except ModelError as error:
        value = error.value.replace("model.path", key, 1)
        raise ModelError(value, error.rule, error.remedy) from error
    if sizes[0] != sizes[1] or words[0] != words[1]:
        raise ModelError(
            f"{key}={model.path}",
            f"has another vocabulary ({sizes[1]:,} tokens) than model.path ({sizes[0]:,}), {why}",
            "write a model with the tokenizer of model.path",
        )


@dataclass(frozen=True)
class LogitsFile:
    """The size of a file of logits: a row of `width` numbers for each label token."""

    rows: int
    width: int
    number_bytes: int

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        return self.rows * self.width * self.number_bytes

    def __str__(self) -> str:
        return (
            f"{in_gib(self.bytes)} GiB ({self.rows:,} label tokens x {self.width:,} words x "
            f"{self.number_bytes} bytes)"
        )


def logits_file(config: Config, data: PreparedData) -> LogitsFile | None:
    """What `train.kd.cache: disk` writes; None under `memory` and without a teacher."""
    if config.train.kd is None or config.train.kd.cache == "memory":
        return None
    width = load_model_config(teacher_model(config)).get_text_config().vocab_size
    number_bytes = stored(config.train.precision).itemsize
    return LogitsFile(int(data.train.label_counts.sum()), width, number_bytes)


def check_size(config: Config, data: PreparedData) -> None:
    """Raises ConfigError where the teacher's logits exceed `train.kd.cache_limit_gib`."""
    file, settings = logits_file(config, data), config.train.kd
    if file is None or settings is None or file.bytes <= settings.cache_limit_gib * GIB:
        return
    raise ConfigError(
        "train.kd.cache=disk",
        f"would keep {file}, more than train.kd.cache_limit_gib={settings.cache_limit_gib:g}",
        f"write train.kd.cache_limit_gib: {in_gib(round(1.01 * file.bytes))}, or "
        "train.kd.cache: memory",
    )


def in_gib(count: int) -> str:
    """GiB with three significant digits, from 1,000 on as a whole number."""
    return f"{count / GIB:.3g}" if count < 1000 * GIB else f"{count / GIB:.0f}"


class InMemory:
    """A teacher that runs on each batch of the student, with every example in a row of its own.

    So the student may pack where the teacher's architecture does not allow it.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Tensor:
        """`logits_NV` at the label positions of the batch, in its order."""
        return self._runner.logits(batch.unpacked(self._runner.pad_token))


@dataclass(frozen=True)
class Kept:
    """A teacher that reads what `InMemory` would compute, for batches of training examples.

    `first_rows` is [n + 1]: example `i` has the rows `first_rows[i]` to `first_rows[i + 1]` of
    `logits_NV`.
    """

    logits_NV: npt.NDArray[Any]
    first_rows: npt.NDArray[np.int64]
    device: torch.device

    def __call__(self, batch: MicroBatch) -> Tensor:
        """`logits_NV` at the label positions of the batch, in its order."""
        first = self.first_rows
        rows = [self.logits_NV[first[i] : first[i + 1]] for i in batch.indices]
        return tensor_of(np.concatenate([self.logits_NV[:0], *rows])).to(
            self.device, non_blocking=True
        )
