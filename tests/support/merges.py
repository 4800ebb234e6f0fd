"""Merges of tensors that are in memory as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raytune_ft.merge.methods import Formula, MergeSettings, Position


def merge_tensors(
    formula: Formula,
    tensors: Sequence[Tensor],
    base: Tensor,
    settings: MergeSettings | None = None,
    name: str = "",
) -> Tensor:
    """Merge tensors of float32 and one shape; `name` seeds dare."""
    settings = settings or MergeSettings()
    facts = None
    if formula.measure is not None:
        facts = formula.measure(lambda: [(tensors, base)], base.numel(), settings)
    return formula.combine(tensors, base, settings, facts, Position(name))
