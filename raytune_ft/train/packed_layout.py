"""Which examples of which slot go into the next pass. Pure, free of torch.

All slots of a pass contribute equally many rows of one width, so that a product over rows is a
batch of equal products over slots. A slot's own step takes as many passes as it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytune_ft.data.layout import Row, fill_rows

PASS_TOKENS = 256
"""What a pass costs beside its tokens, in tokens: launching its operators."""


@dataclass(frozen=True)
class PackedPass:
    """The slots `first .. first + len(rows) - 1`, each with `len(rows[0])` rows.

    A row holds positions in the slot's list of waiting examples; it may be empty.
    """

    first: int
    rows: tuple[tuple[Row, ...], ...]


def plan_pass(
    waiting: Sequence[Sequence[int]], first: int, micro_tokens: int, packing: bool
) -> PackedPass:
    """The pass that begins with slot `first`.

    `waiting` has, for each slot, the lengths of the examples that its step still lacks, at least
    one, longest first. At most `micro_tokens` tokens, padding included, but always one row of one
    slot. Among the numbers of rows that fit, the one with the most tokens for their cost.
    """
    count, width = _participants(waiting[first:], micro_tokens)
    slots = waiting[first : first + count]
    rows = [_fullest_first(lengths, width, packing) for lengths in slots]
    room = max(1, micro_tokens // (count * width))
    height = _best_height(
        [
            [sum(map(of.__getitem__, row)) for row in own]
            for own, of in zip(rows, slots, strict=True)
        ],
        width,
        room,
    )
    return PackedPass(first, tuple(tuple((own + [()] * height)[:height]) for own in rows))


def _participants(waiting: Sequence[Sequence[int]], micro_tokens: int) -> tuple[int, int]:
    """How many slots one row each of which fits, shared evenly over the passes that reach all."""
    most, width = 0, 0
    for lengths in waiting:
        wider = max(width, lengths[0])
        if most and (most + 1) * wider > micro_tokens:
            break
        most, width = most + 1, wider
    passes = -(-len(waiting) // most)
    count = -(-len(waiting) // passes)
    return count, max(lengths[0] for lengths in waiting[:count])


def _fullest_first(lengths: Sequence[int], width: int, packing: bool) -> list[Row]:
    rows = fill_rows(range(len(lengths)), lengths, width if packing else 0)
    return sorted(rows, key=lambda row: -sum(lengths[position] for position in row))


def _best_height(filled: Sequence[Sequence[int]], width: int, room: int) -> int:
    """`filled` has the tokens of every row of every slot, fullest first."""
    best, best_worth, tokens = 1, 0.0, 0
    for height in range(1, min(room, max(map(len, filled))) + 1):
        tokens += sum(own[height - 1] for own in filled if len(own) >= height)
        worth = tokens / (PASS_TOKENS + len(filled) * height * width)
        if worth >= best_worth:
            best, best_worth = height, worth
    return best
