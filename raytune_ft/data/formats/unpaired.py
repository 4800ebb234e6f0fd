"""Answers of which each is said to be desirable or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.arrays import Empty, Indices, items, spans, summed, token_spans
from raytune_ft.data.formats.example import DESIRABLE, Encoder, Example, RowReader
from raytune_ft.data.formats.prompt_completion import PROMPT_COMPLETION
from raytune_ft.data.order import permutation
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.data.split import Mask, TokenIds, TokenizedSplit, write_split

LABELS: dict[Any, float] = {
    **dict.fromkeys((True, 1, "true", "True", "1"), 1.0),
    **dict.fromkeys((False, 0, "false", "False", "0"), 0.0),
}
_STREAM = 2**32 - 3


def _columns(source: SourceConfig) -> dict[str, str]:
    return {**PROMPT_COMPLETION.columns(source), "label": source.label}


def _check(source: SourceConfig, row: Row) -> BadRow | None:
    value = row.values[source.label]
    if not isinstance(value, bool | int | float | str) or value not in LABELS:
        detail = f"{source.label!r} is {value!r:.40}, and may be true, false, 1 or 0"
        return BadRow(row.origin, "bad_label", detail)
    return PROMPT_COMPLETION.check(source, row)


def _encode(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    plain = source.model_copy(update={"format": "prompt_completion"})
    made = PROMPT_COMPLETION.encode(encoder, plain, separator, rows)
    return [
        one if isinstance(one, BadRow) else _labelled(one, LABELS[row.values[source.label]])
        for row, one in zip(rows, made, strict=True)
    ]


def _labelled(example: Example, label: float) -> Example:
    others = tuple(_labelled(other, label) for other in example.others)
    return replace(example, columns={**example.columns, DESIRABLE: (label,)}, others=others)


UNPAIRED = RowReader(
    columns=_columns,
    check=_check,
    prompt=PROMPT_COMPLETION.prompt,
    encode=_encode,
    optional=PROMPT_COMPLETION.optional,
)


def write_partners(
    path: Path, split: TokenizedSplit, seed: int, max_length: int, empty: Empty
) -> None:
    """Write a split that has, for each example, its prompt with the answer of another one, which
    stands for an answer that the model itself might give: the KL term of KTO is estimated on it.

    The other one follows in a random circle over the split, so that each answer is used once.
    """
    circle, partner_n = permutation(seed, 0, len(split), _STREAM), empty(len(split), np.int64)
    for at in spans(len(split)):
        partner_n[circle[at]] = circle[np.arange(at.start + 1, at.stop + 1) % len(split)]
    del circle
    begin_n, prompt_n = split.offsets[:-1], _prompt_lengths(split, empty)
    length_n = empty(len(split), np.int64)
    for at in spans(len(split)):
        other = partner_n[at]
        answer = split.offsets[other + 1] - begin_n[other] - prompt_n[other]
        length_n[at] = np.minimum(prompt_n[at] + answer, max_length)

    def blocks() -> Iterator[tuple[TokenIds, Mask]]:
        for at in token_spans(offsets):
            other, prompts = partner_n[at], prompt_n[at]
            begins = np.stack([begin_n[at], begin_n[other] + prompt_n[other]], 1).reshape(-1)
            lengths = np.stack([prompts, length_n[at] - prompts], 1).reshape(-1)
            places = items(begins, lengths)
            yield split.input_ids[places], split.label_mask[places]

    offsets = summed(length_n, empty)
    write_split(path, offsets, {}, blocks())


def _prompt_lengths(split: TokenizedSplit, empty: Empty) -> Indices:
    """[n], the tokens before the first that carries loss; 0 where none does."""
    found = empty(len(split), np.int64)
    for at in token_spans(split.offsets):
        offsets = split.offsets[at.start : at.stop + 1]
        labels = offsets[0] + np.flatnonzero(split.label_mask[offsets[0] : offsets[-1]])
        first = np.append(labels, offsets[-1])[np.searchsorted(labels, offsets[:-1])]
        found[at] = np.where(first < offsets[1:], first - offsets[:-1], 0)
    return found
