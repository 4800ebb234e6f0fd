"""What a batch predicts: the next token of the same example, where it is a label."""

from __future__ import annotations

import numpy as np
import torch

from raytune_ft.data.batch import NO_TARGET, Span, collate
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.attention import Examples

CPU = torch.device("cpu")
SPLIT = TokenizedSplit.from_examples(
    [
        (np.array([5, 6, 7], np.int32), np.array([False, True, True])),
        (np.array([8, 9], np.int32), np.array([True, True])),
        (np.array([1, 2, 3, 4], np.int32), np.array([False, False, False, True])),
    ]
)


def test_packed_row() -> None:
    batch = collate(SPLIT, [2, 0, 1], ((1, 2), (0,)), pad_token=0, device=CPU)
    n = NO_TARGET
    assert batch.tokens_BS.tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 4, 0]]
    # The last token of an example predicts nothing: not the first of its neighbour.
    assert batch.targets_BS.tolist() == [[6, 7, n, 9, n], [n, n, 4, n, n]]
    assert batch.positions_BS is not None
    assert batch.positions_BS.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.attention_BS is None
    assert Examples.of(batch).owners_BS.tolist() == [[1, 1, 1, 2, 2], [0, 0, 0, 0, -1]]


def test_a_row_holds_a_shared_prompt_once() -> None:
    """But for its last token, which predicts something else for each answer."""
    prompt, other, n = [7, 8, 9], [7, 8, 5], NO_TARGET
    rows = [[*prompt, 1, 2], [*other, 3], [*prompt, 4], [*prompt, 6, 6]]
    split = TokenizedSplit.from_examples(
        [(np.array(row, np.int32), np.arange(len(row)) >= 3) for row in rows]
    )
    batch = collate(split, range(4), ((0, 1, 2), (3,)), pad_token=0, device=CPU, share=True)
    assert batch.tokens_BS.tolist() == [
        [7, 8, 9, 1, 2, 7, 8, 5, 3, 9, 4],
        [7, 8, 9, 6, 6] + 6 * [0],
    ]
    assert batch.targets_BS[0].tolist() == [n, n, 1, 2, n, n, n, 3, n, 4, n]
    assert batch.positions_BS is not None
    assert batch.positions_BS[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 2, 3]
    assert batch.spans[2] == Span(0, 9, 11, 2, shared=2, prompt=0)
    assert batch.prompts == (3, 3, 3, 3)
    assert batch.labels == (2, 1, 1, 2)
    plain = collate(split, range(4), ((0, 1, 2), (3,)), pad_token=0, device=CPU)
    for name in ("tokens_BS", "targets_BS", "attention_BS", "labels_N", "spans"):
        one, two = (getattr(each.unpacked(0), name) for each in (batch, plain))
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_padded_rows() -> None:
    batch = collate(SPLIT, [0, 1], ((0,), (1,)), pad_token=0, device=CPU)
    assert batch.positions_BS is None
    assert batch.attention_BS is not None
    assert batch.attention_BS.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_rows_of_one_length_need_no_mask() -> None:
    assert collate(SPLIT, [0], ((0,),), pad_token=0, device=CPU).attention_BS is None


def test_empty_layout_predicts_nothing() -> None:
    batch = collate(SPLIT, [0], (), pad_token=0, device=CPU)
    assert batch.tokens_BS.shape == (1, 1)
    assert (batch.targets_BS == NO_TARGET).all()
    assert batch.spans == ()


def test_targets_are_counted_as_labels() -> None:
    batch = collate(SPLIT, [0, 1, 2], ((0, 1, 2),), pad_token=0, device=CPU)
    assert int((batch.targets_BS != NO_TARGET).sum()) == int(SPLIT.label_counts.sum())
