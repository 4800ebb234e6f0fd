"""Gradients against differences of the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEP = 1e-6


def slopes(
    loss: Callable[[], Tensor], weights: Sequence[Tensor], way: Sequence[Tensor]
) -> tuple[float, float]:
    """The slope of `loss` along a direction in all weights: (by autograd, by central differences).
    The weights are float64.
    """
    grads = torch.autograd.grad(loss(), weights)

    def at(step: float) -> float:
        with torch.no_grad():
            for weight, part in zip(weights, way, strict=True):
                weight += step * part
            found = float(loss())
            for weight, part in zip(weights, way, strict=True):
                weight -= step * part
        return found

    slope = sum(float((g * part).sum()) for g, part in zip(grads, way, strict=True))
    return slope, (at(STEP) - at(-STEP)) / (2 * STEP)
