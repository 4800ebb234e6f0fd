"""Answers of which each is said to be desirable or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats.example import DESIRABLE, Encoder, Example, RowReader
from raytune_ft.data.formats.prompt_completion import PROMPT_COMPLETION
from raytune_ft.data.order import permutation
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.data.split import TokenizedSplit

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


def partners_of(split: TokenizedSplit, seed: int, max_length: int) -> TokenizedSplit:
    """For each example its prompt with the answer of another one, which stands for an answer that
    the model itself might give: the KL term of KTO is estimated on it.

    The other one follows in a random circle over the split, so that each answer is used once.
    """
    circle = permutation(seed, 0, len(split), _STREAM)
    partner = np.empty_like(circle)
    partner[circle] = np.roll(circle, -1)
    made = []
    for i, other in enumerate(partner.tolist()):
        (ids, mask), (their_ids, their_mask) = split.example(i), split.example(other)
        prompt, theirs = int(mask.argmax()), int(their_mask.argmax())
        joined = np.concatenate([ids[:prompt], their_ids[theirs:]])[:max_length]
        labels = np.concatenate([mask[:prompt], their_mask[theirs:]])[:max_length]
        made.append((joined, labels))
    return TokenizedSplit.from_examples(made)
