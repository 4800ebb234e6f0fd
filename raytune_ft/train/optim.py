"""AdamW and its learning rate, as functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple

import torch
from torch import nn

from raytune_ft.config.train import TrainConfig
from raytune_ft.model.methods.base import ParamGroup


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    train: TrainConfig,
    groups: Mapping[str, ParamGroup] | None = None,
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with weight decay on matrices only.

    `groups` has, by name, the weights whose settings differ from those of the run.
    """
    found: dict[tuple[ParamGroup, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        group = (groups or {}).get(name, ParamGroup())
        found.setdefault((group, parameter.ndim >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": held,
                "weight_decay": train.weight_decay if is_matrix else 0.0,
                "lr_ratio": group.lr_ratio,
                "waits": math.ceil(group.from_examples / train.batch_size),
            }
            for (group, is_matrix), held in sorted(
                found.items(), key=lambda item: (astuple(item[0][0]), not item[0][1])
            )
        ],
        lr=train.lr,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,  # one pass through memory, and no temporary copies of the weights
    )


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` (from 0): linear warm-up to `train.lr`, then the schedule."""
    warmup_steps = math.ceil(train.warmup_fraction * total_steps)
    if step < warmup_steps:
        return train.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if train.lr_schedule == "linear":
        return train.lr * (1 - progress)
    if train.lr_schedule == "cosine":
        return train.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return train.lr


def total_examples(train: TrainConfig, available: int) -> int:
    """The budget in examples: `epochs` or `max_examples`, whichever ends first."""
    if train.epochs is None and train.max_examples is not None:
        return train.max_examples
    passes = max(1, round((train.epochs or 1) * available))
    return passes if train.max_examples is None else min(passes, train.max_examples)
