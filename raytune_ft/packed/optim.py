"""The weights and moments of many adapters, and AdamW on each with its own settings.

Shapes: K slots, N numbers of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw

from raytune_ft.config.train import TrainConfig
from raytune_ft.strategy import Strategy


@dataclass(frozen=True)
class Step:
    """The optimizer step of one slot."""

    slot: int
    lr: float
    settings: TrainConfig


class PackedAdamW:
    """Row k of each tensor belongs to slot k; no operation reads one row and writes another."""

    def __init__(self, slots: int, strategy: Strategy) -> None:
        self._strategy = strategy
        dtype = torch.float64 if strategy.precision == "float64" else torch.float32
        empty = torch.zeros(slots, 0, dtype=dtype, device=strategy.device)
        self.numbers_KN, self.gradients_KN, self.exp_avg_KN, self.exp_avg_sq_KN = (
            empty.clone() for _ in range(4)
        )
        self.steps_K = torch.zeros(slots, device=strategy.device)

    def widen(self, count: int) -> None:
        """Lengthen every adapter to `count` numbers; the new ones are zero."""
        extra = (0, count - self.numbers_KN.shape[1])
        self.numbers_KN = F.pad(self.numbers_KN, extra)
        self.gradients_KN = F.pad(self.gradients_KN, extra)
        self.exp_avg_KN = F.pad(self.exp_avg_KN, extra)
        self.exp_avg_sq_KN = F.pad(self.exp_avg_sq_KN, extra)

    def keep(self, slots: int) -> None:
        """Keep the first `slots` and free the memory of the others."""
        self.numbers_KN = self.numbers_KN[:slots].clone()
        self.gradients_KN = self.gradients_KN[:slots].clone()
        self.exp_avg_KN = self.exp_avg_KN[:slots].clone()
        self.exp_avg_sq_KN = self.exp_avg_sq_KN[:slots].clone()
        self.steps_K = self.steps_K[:slots].clone()

    def clear(self, slot: int) -> None:
        """Set a slot to zero, for a new adapter."""
        for each in self._rows():
            each[slot].zero_()

    def move(self, source: int, target: int) -> None:
        """Copy one slot to another."""
        for each in self._rows():
            each[target].copy_(each[source])

    def step(self, steps: Sequence[Step]) -> list[float]:
        """Sum gradients over ranks, clip, step and zero them by slot; the norms before clipping.

        A slot whose gradient is not finite does not move.
        """
        slots = [each.slot for each in steps]
        together = slots == list(range(slots[0], slots[-1] + 1))
        gradients_KN = self.gradients_KN
        chosen_GN = gradients_KN[slots[0] : slots[-1] + 1] if together else gradients_KN[slots]
        if self._strategy.world_size > 1:
            self._strategy.sum(chosen_GN)
            if not together:
                gradients_KN[slots] = chosen_GN
        norms: list[float] = torch.linalg.vector_norm(chosen_GN, dim=1).tolist()
        for each, norm in zip(steps, norms, strict=True):
            if math.isfinite(norm):
                self._step(each, norm)
            self.gradients_KN[each.slot].zero_()
        return norms

    def _step(self, step: Step, norm: float) -> None:
        slot, settings = step.slot, step.settings
        gradient_N = self.gradients_KN[slot]
        if settings.max_grad_norm is not None and norm + 1e-6 > settings.max_grad_norm:
            gradient_N.mul_(settings.max_grad_norm / (norm + 1e-6))
        adamw(
            [self.numbers_KN[slot]],
            [gradient_N],
            [self.exp_avg_KN[slot]],
            [self.exp_avg_sq_KN[slot]],
            [],
            [self.steps_K[slot]],
            fused=True,  # one pass through memory instead of ten
            amsgrad=False,
            beta1=settings.adam_beta1,
            beta2=settings.adam_beta2,
            lr=step.lr,
            weight_decay=settings.weight_decay,
            eps=settings.adam_epsilon,
            maximize=False,
        )

    def _rows(self) -> tuple[Tensor, ...]:
        return (
            self.numbers_KN,
            self.gradients_KN,
            self.exp_avg_KN,
            self.exp_avg_sq_KN,
            self.steps_K,
        )
