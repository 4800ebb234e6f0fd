"""The protocol of an objective. Loop, layout and packing know nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.split import TokenizedSplit

WEIGHT = "weight"
"""The column of a split that holds the weights of its examples."""
Teacher = Callable[[MicroBatch], Tensor]
"""Gives `logits_NV` of a frozen model at the label positions."""
TeacherOf = Callable[[], Teacher]


class Forward(Protocol):
    """A model that computes the outputs that an objective asks for."""

    def logits(self, batch: MicroBatch, keep_N: Tensor | None = None) -> Tensor:
        """`logits_NV` of tokens, by default of those that predict a label token."""

    def by_label(self, batch: MicroBatch, of: Callable[[Tensor, MicroBatch], Tensor]) -> Tensor:
        """`of` the logits of all label tokens, `[N, K]`; it may be called with some at a time."""

    def with_values(
        self, batch: MicroBatch, of: Callable[[Tensor, MicroBatch], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What `by_label` gives, and a critic's `values_N` where label tokens are predicted."""

    def example_logits(self, batch: MicroBatch) -> Tensor:
        """`logits_EL` of a task head, one row for each span of the batch."""

    def summed(
        self, split: TokenizedSplit, indices: Indices, of: Callable[[MicroBatch], Tensor]
    ) -> Tensor:
        """The sum of `of` over batches of these examples on all ranks, without gradients."""


@dataclass(frozen=True)
class Columns:
    """What figures are computed from, by the names that `config.objectives.Figure` uses.

    Attributes:
        rows: `[G, N]`, a value for each label token of each of G models, in the order of the batch.
        examples: `[G, E]` or `[G, E, L]`, for each example, in the order of the batch's spans.
    """

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    examples: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_one(cls, examples: Mapping[str, Tensor]) -> Columns:
        """Of one model, from `[E]` or `[E, L]` for each example."""
        return cls(examples={name: values.unsqueeze(0) for name, values in examples.items()})

    @property
    def all(self) -> dict[str, Tensor]:
        """Both, rows first."""
        return {**self.rows, **self.examples}


class Objective(Protocol):
    """A batch becomes losses, and examples become the number that divides their sum.

    The gradient of a step is that of the summed `losses` of its examples over their `count`, on
    any number of ranks and in any layout of rows.

    `of_tokens`: it reads what the model predicts of tokens; otherwise the logits of a head.
    """

    of_tokens: ClassVar[bool]

    def over(self, split: TokenizedSplit, indices: Indices, forward: Forward) -> Objective:
        """The same for the losses of these examples together, of a step or of an evaluation."""
        return self

    def count(self, split: TokenizedSplit, indices: Indices) -> float:
        """What the losses of these examples are divided by: the sum of what each counts, with its
        weight. Every rank knows it beforehand.
        """
        return float(self.known(split, indices)["counted"].sum())

    def losses(self, forward: Forward, batch: MicroBatch) -> Tensor:
        """One weighted training loss for each label token or example, from one forward pass."""

    def columns(self, forward: Forward, batch: MicroBatch, groups: int) -> Columns:
        """The columns of evaluations that depend on the model, without smoothing.

        The batch holds the same examples `groups` times, once for each of as many models. An
        objective that learns from what the model says measures no data.
        """
        raise TypeError(f"{type(self).__name__} measures no data")

    def known(self, split: TokenizedSplit, indices: Indices) -> dict[str, npt.NDArray[Any]]:
        """`[E]` each: the columns of these examples that depend on the data alone."""
        raise TypeError(f"{type(self).__name__} measures no data")


class OfLogps(Objective):
    """An objective that reads the log-probabilities of label tokens alone, so that several of them
    can share a pass.
    """

    @property
    def temperature(self) -> float:
        """What logits are divided by."""
        return 1.0

    def losses_of(self, logps_N: Tensor, batch: MicroBatch) -> Tensor:
        """`losses` from the log-probabilities of the batch's label tokens."""
        raise NotImplementedError

    def columns_of(self, logps_N: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """`columns` of examples, from the same."""
        raise TypeError(f"{type(self).__name__} measures no data")


def example_weights(columns: Mapping[str, Any]) -> Any:
    """`[E]`, the weight of each example; None where all weigh the same."""
    weight_E1 = columns.get(WEIGHT)
    return None if weight_E1 is None else weight_E1[:, 0]


def weighted_losses(losses_E: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    """`[E]`, each times the weight of its example."""
    weights_E = example_weights(columns)
    return losses_E if weights_E is None else losses_E * weights_E


def weighted_tokens(losses_N: Any, batch: MicroBatch) -> Any:
    """`[N]`, each times the weight of its example."""
    weights_E = example_weights(batch.columns)
    return losses_N if weights_E is None else losses_N * weights_E.index_select(0, batch.owners_N)


def weighted_examples(split: TokenizedSplit, indices: Indices) -> dict[str, npt.NDArray[Any]]:
    """`[E]` each: examples, and what the loss counts of them."""
    ones_E = np.ones(len(indices))
    weights_n1 = split.columns.get(WEIGHT)
    counted_E = ones_E if weights_n1 is None else weights_n1[indices, 0].astype(np.float64)
    return {"examples": ones_E, "counted": counted_E}


def columns_at(split: TokenizedSplit, indices: Sequence[int] | Indices) -> dict[str, Any]:
    """The data columns of these examples."""
    return {name: values[indices] for name, values in split.columns.items()}
