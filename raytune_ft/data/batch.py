"""One forward pass: tokens, what they predict, and where each example stands.

Shapes: B rows, S tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raytune_ft.data.layout import MicroLayout
from raytune_ft.data.order import Indices
from raytune_ft.data.split import TokenizedSplit

NO_TARGET = -100


@dataclass(frozen=True)
class Span:
    """Tokens `start .. stop - 1` of `row` are the example at `example` in the step's list."""

    row: int
    start: int
    stop: int
    example: int


@dataclass(frozen=True)
class MicroBatch:
    """`targets_BS[b, s]` is the token after `tokens_BS[b, s]` in its own example, or NO_TARGET.

    `positions_BS` restarts at every example of a packed row and is None elsewhere;
    `attention_BS` marks the tokens that are not padding, and is None where the model needs none.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    positions_BS: Tensor | None
    attention_BS: Tensor | None
    spans: tuple[Span, ...]

    def model_inputs(self) -> dict[str, Tensor | bool]:
        """Keyword arguments of a Hugging Face model's forward."""
        inputs: dict[str, Tensor | bool] = {"input_ids": self.tokens_BS, "use_cache": False}
        if self.positions_BS is not None:
            inputs["position_ids"] = self.positions_BS
        if self.attention_BS is not None:
            inputs["attention_mask"] = self.attention_BS
        return inputs

    def owners_BS(self) -> Tensor:
        """For every token, the position of its example in the step's list; -1 for padding."""
        owners_BS = torch.full(self.tokens_BS.shape, -1, dtype=torch.int64)
        for span in self.spans:
            owners_BS[span.row, span.start : span.stop] = span.example
        return owners_BS.to(self.tokens_BS.device)


def collate(
    split: TokenizedSplit,
    indices: Sequence[int] | Indices,
    layout: MicroLayout,
    pad_token: int,
    device: torch.device,
) -> MicroBatch:
    """Write the examples `indices` of `split` into rows as `layout` says.

    An empty layout gives one token that predicts nothing: a forward of weight zero, for ranks
    that have no work left while others still communicate.
    """
    examples = [
        [(position, *split.example(indices[position])) for position in row] for row in layout
    ]
    width = max((sum(len(ids) for _, ids, _ in row) for row in examples), default=1)
    shape = (max(len(examples), 1), width)
    tokens_BS = np.full(shape, pad_token, np.int64)
    targets_BS = np.full(shape, NO_TARGET, np.int64)
    positions_BS = np.zeros(shape, np.int64)
    attention_BS = np.zeros(shape, np.int64)
    spans = []
    for row, contents in enumerate(examples):
        start = 0
        for position, ids, label_mask in contents:
            stop = start + len(ids)
            tokens_BS[row, start:stop] = ids
            targets_BS[row, start : stop - 1] = np.where(label_mask[1:], ids[1:], NO_TARGET)
            positions_BS[row, start:stop] = np.arange(len(ids))
            attention_BS[row, start:stop] = 1
            spans.append(Span(row, start, stop, position))
            start = stop
        # Padding is a document of its own: under a mask from positions no example sees it.
        positions_BS[row, start:] = np.arange(width - start)
    packed = any(len(row) > 1 for row in layout)
    padded = bool((attention_BS == 0).any()) and bool(layout)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return MicroBatch(
        tensor(tokens_BS),
        tensor(targets_BS),
        tensor(positions_BS) if packed else None,
        tensor(attention_BS) if padded and not packed else None,
        tuple(spans),
    )
