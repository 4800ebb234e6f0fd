"""Whether written weights compute the same as their origin, without loading either model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from raytune_ft.errors import MergeError
from raytune_ft.merge.adapter_plan import base_name, is_adapters, key_of
from raytune_ft.merge.folded_weights import Adapted
from raytune_ft.merge.streaming_forward import Find, Read, Weights, converted, logits, whole
from raytune_ft.model.meta import Outline

ABSOLUTE_TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-5
ROUNDING_TOLERANCE = 2.0**-5
_LOGITS = 1 << 25
"""Elements of the logits that are compared: 128 MB in float32."""


@dataclass(frozen=True)
class FoldCheck:
    """How far the written model is from base + adapter, on `tokens` held-out tokens.

    A task head has one row of logits for each example, and `tokens` counts those.

    Attributes:
        dtype: of the written weights.
        tolerance: largest absolute difference of a logit allowed without rounding.
        fold_difference: the largest in float32, before rounding; checked against `tolerance`.
        written_difference: the largest for the written directory; checked only in float32.
        rounding: root mean square of that difference, relative to the spread of the logits.
        rounding_tolerance: the bound for `rounding`, None if nothing is rounded.
        kl: Kullback-Leibler divergence of the written model's next-token distribution from that of
            base + adapter, in nats, mean over the tokens.
    """

    dtype: str
    tokens: int
    tolerance: float
    fold_difference: float
    written_difference: float
    rounding: float
    rounding_tolerance: float | None
    kl: float = 0.0


def run_weights(outline: Outline, weights: Weights, examples: Sequence[Tensor]) -> Tensor:
    """`[N, V]`: the logits of the model of `outline` with these weights."""
    find = partial(_find, outline, weights)
    return _logits(outline, outline.model, find, examples)


def run_adapter(
    outline: Outline, base: Weights, adapted: Adapted, examples: Sequence[Tensor]
) -> Tensor:
    """`[N, V]`: the logits of base + adapter; PEFT's layers are in the model of `outline`."""

    def find(name: str) -> Read:
        if is_adapters(name):
            key = key_of(name)
            return Read(adapted.adapter.shapes[key], partial(adapted.adapter.rows, key))
        target = base_name(name)
        replaced = adapted.plan.replaced.get(target)
        if replaced is not None and ".original_module" not in name:
            return Read(adapted.adapter.shapes[replaced], partial(adapted.adapter.rows, replaced))
        return _find(outline, base, target)

    return _logits(outline, adapted.plan.peft, find, examples)


def _logits(outline: Outline, model: Any, find: Find, examples: Sequence[Tensor]) -> Tensor:
    """Of a task head those of all examples, else those of so few tokens that they fit in memory."""
    text = outline.pattern.config.get_text_config()
    if outline.head is not None:
        return logits(model, find, examples, text.pad_token_id)
    most = max(1, _LOGITS // text.vocab_size // max(1, len(examples)))
    return logits(model, find, [ids[:most] for ids in examples])


def _find(outline: Outline, weights: Weights, name: str) -> Read:
    sources = outline.sources
    ties = getattr(outline.pattern, "all_tied_weights_keys", None) or {}
    source = sources.get(name) or sources[ties[name]]
    if source.converter is None:
        stored = source.tensors[0][1]
        return Read(weights.shapes[stored], partial(weights.rows, stored))
    made = converted(source, outline, partial(whole, weights))[name]
    return Read(tuple(made.shape), lambda start, end: made[start:end])


def compare(
    reference: Tensor, exact: Tensor, written: Tensor, dtype: torch.dtype, of: str
) -> FoldCheck:
    """Compare logits `[N, V]`: the reference's, those before rounding, and those as written.

    Raises:
        MergeError: a difference is larger than its tolerance, or not a number.
    """
    rounds = dtype.itemsize < torch.float32.itemsize
    tolerance = max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * reference.abs().max().item())
    spread = _root_mean_square(reference - reference.mean(-1, keepdim=True))
    spread = spread or _root_mean_square(reference)  # of a head with one output
    check = FoldCheck(
        dtype=str(dtype).removeprefix("torch."),
        tokens=len(reference),
        tolerance=tolerance,
        fold_difference=(exact - reference).abs().max().item(),
        written_difference=(written - reference).abs().max().item(),
        rounding=_root_mean_square(written - reference) / (spread or 1.0),
        rounding_tolerance=ROUNDING_TOLERANCE if rounds else None,
        kl=divergence(reference, written),
    )
    # `not <=` also refuses NaN.
    if not check.fold_difference <= tolerance:
        raise MergeError(
            f"the folded model's logits differ from {of} by {check.fold_difference:.1e}, "
            f"more than {tolerance:.1e}"
        )
    if not rounds and not check.written_difference <= tolerance:
        raise MergeError(
            f"the written model's logits differ from {of} by "
            f"{check.written_difference:.1e}, more than {tolerance:.1e}"
        )
    if rounds and not check.rounding <= ROUNDING_TOLERANCE:
        raise MergeError(
            f"rounding to {check.dtype} moves the logits by {check.rounding:.1%} of their spread, "
            f"more than {ROUNDING_TOLERANCE:.1%}"
        )
    return check


def _root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def divergence(reference_NV: Tensor, other_NV: Tensor) -> float:
    """KL(reference || other) in nats, mean over the tokens."""
    total = 0.0
    for reference, other in zip(reference_NV.split(64), other_NV.split(64), strict=True):
        p, q = F.log_softmax(reference.double(), -1), F.log_softmax(other.double(), -1)
        total += (p.exp() * (p - q)).sum().item()
    return total / max(1, len(reference_NV))
