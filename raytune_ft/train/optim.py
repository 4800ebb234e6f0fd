"""AdamW and its learning rate, as functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from raytune_ft.config.train import TrainConfig


def build_optimizer(parameters: Iterable[nn.Parameter], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with weight decay on matrices only."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters:
        (decayed if parameter.ndim >= 2 else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.lr,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
    )


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` (from 0): linear warm-up to `train.lr`, then the schedule to 0."""
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
    """The budget in examples; `epochs` and `max_examples`, whichever ends first."""
    if train.epochs is None and train.max_examples is not None:
        return train.max_examples
    passes = max(1, round((train.epochs or 1) * available))
    return passes if train.max_examples is None else min(passes, train.max_examples)
