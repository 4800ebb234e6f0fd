"""Which examples of which slot go into the next pass. Pure; imports no torch.

Every slot of a pass contributes the same number of rows, all of one width, so that a product over
rows is a batch of equal products over slots. With packing that is one row for each rank, without
it one row for each example. A slot's step takes as many passes as it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytune_ft.data.batch import FREELY, Apart, Row, fill_rows

PASS_TOKENS = 512
"""The fixed cost of a pass (launching its operators), in tokens, where it was not measured."""


@dataclass(frozen=True)
class PackedPass:
    """The first `len(rows)` slots, each with `len(rows[0])` rows.

    A row holds positions in the slot's list of waiting examples; it may be empty. Rank r of R takes
    the rows r, r + R, ...: every rank takes the same number.
    """

    rows: tuple[tuple[Row, ...], ...]


def plan_pass(
    waiting: Sequence[Sequence[int]],
    micro_tokens: int,
    packing: bool,
    ranks: int = 1,
    apart: Apart = FREELY,
    fixed: int = PASS_TOKENS,
) -> PackedPass:
    """The pass that begins with the first slot.

    `waiting` has, for each slot, the lengths of the examples that its step still lacks, at least
    one, longest first. A pass has at most `micro_tokens` tokens a rank, padding included, but
    always one row of one slot. Of the numbers of rows that fit, the one with the most tokens for a
    rank's cost is taken, to which `fixed` tokens are added. Of examples that are kept apart, a pass
    takes those which may share it with the longest of the first slot.
    """
    group = apart.group(waiting[0][0])
    places = [
        [place for place, length in enumerate(lengths) if apart.group(length) == group]
        for lengths in waiting
    ]
    able = [[lengths[place] for place in own] for lengths, own in zip(waiting, places, strict=True)]
    count, longest = _participants(able, micro_tokens)
    slots = able[:count]
    width = _width(slots, longest, micro_tokens // count, ranks, fixed) if packing else longest
    rows = [_fullest_first(lengths, width, packing) for lengths in slots]
    filled = [
        [sum(lengths[position] for position in row) for row in own]
        for own, lengths in zip(rows, slots, strict=True)
    ]
    width = max(own[0] for own in filled if own)
    room = max(1, micro_tokens // (count * width))
    height = ranks if packing else ranks * _height(filled, width, room, ranks, fixed)
    taken = [
        [tuple(own[index] for index in row) for row in (of_slot + [()] * height)[:height]]
        for of_slot, own in zip(rows, places, strict=False)
    ]
    return PackedPass(tuple(map(tuple, taken)))


def _participants(waiting: Sequence[Sequence[int]], micro_tokens: int) -> tuple[int, int]:
    """How many slots share a pass, and their longest example.

    One row of each fits, and the passes that reach all slots have about equally many of them.
    """
    most, width = 0, 0
    for lengths in waiting:
        wider = max([width, *lengths[:1]])
        if most and (most + 1) * wider > micro_tokens:
            break
        most, width = most + 1, wider
    passes = -(-len(waiting) // most)
    count = -(-len(waiting) // passes)
    return count, max(lengths[0] for lengths in waiting[:count] if lengths)


def _fullest_first(lengths: Sequence[int], width: int, packing: bool) -> list[Row]:
    rows = fill_rows(range(len(lengths)), lengths, width if packing else 0)
    return sorted(rows, key=lambda row: -sum(lengths[position] for position in row))


def _width(slots: Sequence[Sequence[int]], longest: int, room: int, ranks: int, fixed: int) -> int:
    """The width of the one row that each slot has on each rank: what waits in one of the slots.

    At most `room`, unless an example is longer.
    """
    waiting = [-(-sum(lengths) // ranks) for lengths in slots]

    def worth(width: int) -> float:
        return sum(min(tokens, width) for tokens in waiting) / (fixed + len(slots) * width)

    widths = sorted({max(longest, min(tokens, room)) for tokens in waiting})
    return max(widths, key=worth)


def _height(filled: Sequence[Sequence[int]], width: int, room: int, ranks: int, fixed: int) -> int:
    """The number of rows a rank, at most `room`; `filled` has the tokens of every slot's rows,
    fullest first.
    """
    most = -(-max(map(len, filled)) // ranks)
    even = -(-most // -(-most // room))
    best, best_worth, tokens = 1, 0.0, 0
    for height in range(1, even + 1):
        tokens += sum(sum(own[(height - 1) * ranks : height * ranks]) for own in filled)
        worth = tokens / (fixed + len(filled) * height * width)
        if worth >= best_worth:
            best, best_worth = height, worth
    return best
