"""One optimizer step of one slot while passes work on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raytune_ft.data.layout import Row
from raytune_ft.data.order import Indices
from raytune_ft.data.split import TokenizedSplit


class OpenStep:
    """The examples that no pass has had yet, longest first, and what the others came to.

    `label_tokens` and `tokens` are those of the whole step, and `count` is what its losses are
    divided by; `loss_sum` is this rank's.
    """

    def __init__(self, data: TokenizedSplit, indices: Indices, count: float) -> None:
        self._data, self.count = data, count
        lengths = data.lengths[indices]
        self._waiting = indices[np.argsort(-lengths, kind="stable")]
        self.waiting_lengths: list[int] = data.lengths[self._waiting].tolist()
        self.label_tokens = int(data.label_counts[indices].sum())
        self.tokens, self.loss_sum = int(lengths.sum()), 0.0

    def take(self, rows: Sequence[Row]) -> list[list[int]]:
        """The examples at these positions of `waiting_lengths`, which wait no longer."""
        taken = [self._waiting[list(row)].tolist() if row else [] for row in rows]
        left = np.ones(len(self._waiting), bool)
        left[[position for row in rows for position in row]] = False
        self._waiting = self._waiting[left]
        self.waiting_lengths = self._data.lengths[self._waiting].tolist()
        return taken
