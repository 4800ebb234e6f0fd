"""What an objective answers for. Loop, layout and packing know nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.order import Indices
from raytune_ft.data.split import TokenizedSplit

Sums = npt.NDArray[np.float64]


class Forward(Protocol):
    """A model that can be asked for what an objective reads."""

    def logits(self, batch: MicroBatch, keep_BS: Tensor | None = None) -> Tensor:
        """`logits_NV` of tokens, by default of those that predict a label token."""

    def example_logits(self, batch: MicroBatch) -> Tensor:
        """`logits_EL` of a task head, one row for each span of the batch."""


class Objective(Protocol):
    """Outputs of a batch become losses, and a split becomes the number that divides their sum.

    The gradient of a step is that of the summed `losses` of its examples over its `count`, on
    however many ranks and in whatever rows they are.

    `of_tokens`: outputs are logits of tokens; else they are those of a head, one row an example.
    """

    of_tokens: ClassVar[bool]

    def count(self, split: TokenizedSplit, indices: Indices) -> float:
        """What the losses of these examples are divided by; every rank knows it beforehand."""

    def outputs(self, model: Forward, batch: MicroBatch) -> Tensor:
        """What losses and figures are computed from, as the model gives it."""

    def losses(self, model: Forward, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """One training loss for each row of `outputs`, weighted."""

    def sums(self, outputs: Tensor, batch: MicroBatch, groups: int) -> Tensor:
        """`[groups, K]`: what an evaluation adds up, over examples and ranks.

        The batch holds the same examples `groups` times, for as many models.
        """

    def figures(self, sums_K: Sums, split: TokenizedSplit, indices: Indices) -> dict[str, float]:
        """Fields of `EvalMetrics` from those sums over these examples of a split."""


def example_weights(columns: Mapping[str, Any]) -> Any:
    """`[E]`, by how much each example counts; None where all count alike."""
    weight_E1 = columns.get("weight")
    return None if weight_E1 is None else weight_E1[:, 0]


def columns_at(split: TokenizedSplit, indices: Sequence[int] | Indices) -> dict[str, Any]:
    """The columns of these examples."""
    return {name: values[indices] for name, values in split.columns.items()}
