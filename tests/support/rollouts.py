"""Rollouts without a model: completions, scores and log-probabilities that a test writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytune_ft.config.rollouts import RolloutConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.batch import MicroBatch, collate
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.objectives.policy import Grpo
from raytune_ft.model.sampling import Said
from raytune_ft.train.credit import GroupAdvantages
from raytune_ft.train.speaker import Answered, Speaker

Numbers = npt.NDArray[np.float64]
LogpsOf = Callable[[TokenizedSplit], Numbers]
PROMPT = 0
"""The one token of every prompt."""


def train_config(**settings: Any) -> TrainConfig:
    """Of GRPO; keys of `rollout` and of `grpo`, told apart by their names."""
    of_rollout = set(RolloutConfig.model_fields)
    return TrainConfig.model_validate(
        {
            "objective": "grpo",
            "rollout": {k: v for k, v in settings.items() if k in of_rollout},
            "grpo": {k: v for k, v in settings.items() if k not in of_rollout},
        }
    )


def weighed(
    train: TrainConfig,
    said_PG: Sequence[Sequence[Said]],
    totals_PG: Any,
    *,
    scores: Mapping[str, Sequence[Sequence[float | None]]] | None = None,
    logps: LogpsOf | None = None,
    base: LogpsOf | None = None,
    weights_P: Numbers | None = None,
) -> tuple[TokenizedSplit, Numbers]:
    """What a run makes of these completions and their sums of rewards.

    `logps` and `base`: of all label tokens, under the policy and under the model before training.
    `scores`: of each reward, where they are read.
    """

    def of(known: LogpsOf | None) -> Any:
        def call(split: TokenizedSplit, temperature: float) -> Numbers:
            assert known is not None
            return known(split)

        return call

    speaker = cast(Speaker, SimpleNamespace(logps=of(logps), base_logps=of(base)))
    named = [
        [{name: each[p][g] for name, each in (scores or {}).items()} for g in range(len(group))]
        for p, group in enumerate(said_PG)
    ]
    texts = [["" for _ in group] for group in said_PG]
    answered = Answered(said_PG, texts, named, np.array(totals_PG, dtype=np.float64))
    prompts = [Prompt(f"rows.jsonl:{p + 1}", (PROMPT,), (), {}) for p in range(len(said_PG))]
    learnt = GroupAdvantages(train, speaker).assign(prompts, answered, weights_P)
    return learnt.split, learnt.advantages_PG


def in_one_batch(split: TokenizedSplit) -> MicroBatch:
    """All examples, one in a row, in their order."""
    rows = tuple((i,) for i in range(len(split)))
    return collate(split, np.arange(len(split)), rows, PROMPT, torch.device("cpu"))


class Spoken:
    """A model whose logits `[N, V]` of the label tokens are given."""

    def __init__(self, logits_NV: Tensor) -> None:
        self._logits_NV = logits_NV

    def by_label(self, batch: MicroBatch, of: Callable[[Tensor, MicroBatch], Tensor]) -> Tensor:
        """See `Forward.by_label`."""
        return of(self._logits_NV, batch)


def step_loss(train: TrainConfig, split: TokenizedSplit, logits_NV: Tensor) -> Tensor:
    """The loss of one step on the whole rollout."""
    objective = Grpo(settings=train.grpo, rollout=train.rollout)
    model = cast(Any, Spoken(logits_NV))
    losses_N = objective.losses(model, in_one_batch(split))
    return losses_N.sum() / objective.count(split, np.arange(len(split)))
