"""How the examples of one step are laid out over ranks, micro-batches and rows.

Pure and free of torch: every rank computes the layout of all ranks from the lengths alone and
takes its own part, so that nothing has to be communicated. The layout decides speed only; the
loss of a step is a sum over its label tokens, whatever row they stand in.
"""

from __future__ import annotations

from collections.abc import Sequence

Row = tuple[int, ...]
"""Positions (in the step's list of examples) of the examples of one row, in order."""
MicroLayout = tuple[Row, ...]
"""The rows of one forward pass. Empty for a rank that only has to take part."""


def lay_out(
    lengths: Sequence[int], world_size: int, micro_tokens: int, packing: bool
) -> list[list[MicroLayout]]:
    """Per rank, the micro-batches of one step; all ranks have the same number of them.

    A micro-batch holds at most `micro_tokens` tokens, padding included, but always one row.
    """
    ranks = [
        _micro_batches(
            fill_rows(mine, lengths, _longest(mine, lengths) if packing else 0),
            lengths,
            micro_tokens,
        )
        for mine in _split_over_ranks(lengths, world_size)
    ]
    most = max(len(rank) for rank in ranks)
    # Collectives dead-lock when ranks differ in the number of passes: the rest are empty ones.
    return [rank + [()] * (most - len(rank)) for rank in ranks]


def _longest(positions: Sequence[int], lengths: Sequence[int]) -> int:
    return max((lengths[position] for position in positions), default=0)


def _longest_first(positions: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(positions, key=lambda position: (-lengths[position], position))


def _split_over_ranks(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Longest example first to the rank with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for position in _longest_first(range(len(lengths)), lengths):
        rank = loads.index(min(loads))
        shares[rank].append(position)
        loads[rank] += lengths[position]
    return shares


def fill_rows(positions: Sequence[int], lengths: Sequence[int], width: int) -> list[Row]:
    """First-fit decreasing into rows of `width`; one example a row where two do not fit.

    Rows as long as the longest example are a good choice: attention over a row costs the square
    of its length.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for position in _longest_first(positions, lengths):
        fits = (index for index, room in enumerate(free) if lengths[position] <= room)
        index = next(fits, len(rows))
        if index == len(rows):
            rows.append([])
            free.append(width)
        rows[index].append(position)
        free[index] -= lengths[position]
    return [tuple(row) for row in rows]


def _micro_batches(
    rows: Sequence[Row], lengths: Sequence[int], micro_tokens: int
) -> list[MicroLayout]:
    """Consecutive rows, longest first, as many as the budget of padded tokens allows."""
    widths = {row: sum(lengths[position] for position in row) for row in rows}
    batches: list[list[Row]] = []
    width = 0
    for row in sorted(rows, key=lambda row: -widths[row]):
        if batches and (len(batches[-1]) + 1) * width <= micro_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
            width = widths[row]
    return [tuple(batch) for batch in batches]
