"""One forward pass: tokens, what they predict, and where each example stands.

Shapes: B rows, S tokens of the longest row, E examples, Q sequences, each a span of a row (one for
each example, two for a pair of answers), T tokens of all of them, N label tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from raytune_ft.data.arrays import Indices
from raytune_ft.data.split import TokenizedSplit, first_answer, parts_of

Row = tuple[int, ...]
"""The sequences of one row, in order: their positions among those of the step's examples."""
MicroLayout = tuple[Row, ...]
"""The rows of one forward pass. Empty for a rank that has no examples left in the step."""


@dataclass(frozen=True)
class Apart:
    """Which examples may not share a forward pass, since the longest would change the others.

    Those on both sides of a threshold (a length up to it is below), and any two of different
    lengths of which one is over `each_above`.
    """

    thresholds: tuple[int, ...] = ()
    each_above: int | None = None

    def group(self, length: int) -> tuple[int, int]:
        """Examples may share a pass where this is equal."""
        over = self.each_above is not None and length > self.each_above
        return bisect_left(self.thresholds, length), length if over else 0

    def __or__(self, other: Apart) -> Apart:
        """What both keep apart."""
        above = [each for each in (self.each_above, other.each_above) if each is not None]
        both = {*self.thresholds, *other.thresholds}
        return Apart(tuple(sorted(both)), min(above, default=None))


FREELY = Apart()


def lay_out(
    lengths: Sequence[int],
    world_size: int,
    micro_tokens: int,
    packing: bool,
    apart: Apart = FREELY,
    parts: int = 1,
    wide: int = 0,
    prompts: Sequence[SharedPrompt] | None = None,
) -> list[list[MicroLayout]]:
    """Per rank, the micro-batches of one step; all ranks have the same number of them.

    `lengths` are those of sequences, of which each example has `parts`. A micro-batch holds at most
    `micro_tokens` tokens, padding included, but always one row, and all sequences of an example.

    Packed rows are as long as the longest example, since attention over a row costs the square of
    its length; or up to `wide` tokens, where it does not. `prompts` are those of the sequences,
    where a packed row holds a prompt once for all sequences in it that begin with it.
    """
    examples = [range(first, first + parts) for first in range(0, len(lengths), parts)]
    if prompts is None:
        units = [_Unit(tuple(one), sum(lengths[number] for number in one)) for one in examples]
    else:
        units = _families(examples, lengths, prompts, apart, wide, world_size)
    whole = [unit.tokens for unit in units]
    longest = [max(lengths[number] for number in unit.sequences) for unit in units]

    def micro_batches(own: list[int]) -> list[MicroLayout]:
        width = max(_longest(own, whole), wide) if packing else 0
        blocks: list[tuple[MicroLayout, int]] = []
        for filled in fill_rows(own, whole, width):
            row = tuple(number for place in filled for number in units[place].sequences)
            if packing:
                blocks.append(((row,), sum(whole[place] for place in filled)))
            else:
                blocks.append((tuple((number,) for number in row), longest[filled[0]]))
        return _micro_batches(blocks, micro_tokens)

    ranks = [
        [batch for own in _groups(mine, longest, apart) for batch in micro_batches(own)]
        for mine in _split_over_ranks(whole, world_size)
    ]
    most = max(len(rank) for rank in ranks)
    # Collectives dead-lock when ranks differ in the number of passes: the others get empty ones.
    return [rank + [()] * (most - len(rank)) for rank in ranks]


@dataclass(frozen=True)
class SharedPrompt:
    """What a sequence may have in common with others of its row: the first `tokens` of those before
    its first label, with all others that have the same `ids`.
    """

    ids: bytes
    tokens: int


def prompts_in(split: TokenizedSplit, numbers: Indices) -> list[SharedPrompt]:
    """The prompts of these sequences. The last token of a prompt is not shared, since what it
    predicts is each sequence's own.
    """
    found = []
    for number in numbers.tolist():
        ids, mask = split.sequence(number)
        length = first_answer(mask).start
        found.append(SharedPrompt(ids[:length].tobytes(), max(length - 1, 0)))
    return found


@dataclass(frozen=True)
class _Unit:
    """Sequences that stay in one row where rows are packed, and in one micro-batch elsewhere.

    `tokens`: of the row that they take.
    """

    sequences: tuple[int, ...]
    tokens: int


def _families(
    examples: Sequence[range],
    lengths: Sequence[int],
    prompts: Sequence[SharedPrompt],
    apart: Apart,
    wide: int,
    world_size: int,
) -> list[_Unit]:
    """Examples with the same prompts together, in units of at most `wide` tokens, and cut where the
    share of a rank would end if one after another were filled.
    """
    families: dict[tuple[tuple[int, int], tuple[SharedPrompt, ...]], list[range]] = {}
    for one in examples:
        group = apart.group(max(lengths[number] for number in one))
        key = group, tuple(prompts[number] for number in one)
        families.setdefault(key, []).append(one)

    once = [sum(each.tokens for each in set(asked)) for _, asked in families]
    own_of = [
        [sum(lengths[number] - prompts[number].tokens for number in one) for one in family]
        for family in families.values()
    ]
    share = -(-(sum(once) + sum(map(sum, own_of))) // world_size)
    units: list[_Unit] = []
    filled = 0
    for family, prompt, owns in zip(families.values(), once, own_of, strict=True):
        unit, tokens = list[int](), 0
        for one, own in zip(family, owns, strict=True):
            more = own if unit else prompt + own
            if unit and (tokens + more > wide or filled + more > share):
                units.append(_Unit(tuple(unit), tokens))
                unit, tokens, more = [], 0, prompt + own
            filled = more if filled + more > share else filled + more
            unit, tokens = [*unit, *one], tokens + more
        units.append(_Unit(tuple(unit), tokens))
    return units


def _groups(positions: Sequence[int], lengths: Sequence[int], apart: Apart) -> list[list[int]]:
    """The positions of units that may share a pass."""
    groups: dict[tuple[int, int], list[int]] = {}
    for position in positions:
        groups.setdefault(apart.group(lengths[position]), []).append(position)
    return list(groups.values())


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
    """First-fit decreasing into rows of `width`; one example a row where two do not fit."""
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
    blocks: Sequence[tuple[MicroLayout, int]], micro_tokens: int
) -> list[MicroLayout]:
    """Consecutive blocks of rows, widest first, as many as the budget of padded tokens allows."""
    batches: list[list[Row]] = []
    widest = 0
    for block, width in sorted(blocks, key=lambda block: -block[1]):
        if batches and (len(batches[-1]) + len(block)) * widest <= micro_tokens:
            batches[-1] += block
        else:
            batches.append([*block])
            widest = width
    return [tuple(batch) for batch in batches]


NO_TARGET = -100


@dataclass(frozen=True)
class Span:
    """Tokens `start .. stop - 1` of `row` are this sequence of those of the step's examples.

    Its first `shared` tokens are not among them: they are those of the row from `prompt` on, with
    which an earlier sequence of the row begins.
    """

    row: int
    start: int
    stop: int
    sequence: int
    shared: int = 0
    prompt: int = 0


Move = Callable[[Tensor], Tensor]


class Movable(Protocol):
    """What a model asks for beside a batch, made of its tensors."""

    def moved(self, move: Move) -> Self:
        """The same, with each of its tensors given to `move`."""


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass.

    It is made on the host and then moved: nothing in a pass asks the device where labels are.

    Every span begins with `virtual` positions for virtual tokens of a method, which have no target.

    `targets_BS[b, s]` is the token after `tokens_BS[b, s]` in its own example, or NO_TARGET.
    `labels_N` are the positions b * S + s that have a target, in this order, and `owners_N` are the
    numbers of their spans.

    `positions_BS` restarts at every span of a packed row and is None elsewhere;
    `attention_BS` marks the tokens that are not padding, and is None where the model needs none.
    For each span, `prompts` are the tokens before its first label, all of them where it has none,
    and `labels` its label tokens. `label_columns` are the split's `[N]`. `examples` is for
    attention by example.

    Where each example is one sequence, `members_PE` is None and examples are in the order of
    `spans`, which is that of rows. Else it has the numbers of the spans of each example, which are
    in the order of the step's list. In that order, `columns` are the split's `[E, width]`,
    `places` are the examples' positions in the step's list and `indices` those in the split.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    labels_N: Tensor
    owners_N: Tensor
    positions_BS: Tensor | None
    attention_BS: Tensor | None
    spans: tuple[Span, ...]
    virtual: int = 0
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    indices: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    label_columns: Mapping[str, Tensor] = field(default_factory=dict)
    members_PE: Tensor | None = None
    examples: Movable | None = None

    @property
    def parts(self) -> int:
        """Sequences of each example."""
        return 1 if self.members_PE is None else len(self.members_PE)

    @property
    def targets_N(self) -> Tensor:
        """The label tokens."""
        return self.targets_BS.view(-1).index_select(0, self.labels_N)

    def labelled(self, chosen: slice) -> MicroBatch:
        """The same with some of its label tokens alone."""
        return replace(
            self,
            labels_N=self.labels_N[chosen],
            owners_N=self.owners_N[chosen],
            label_columns={name: values[chosen] for name, values in self.label_columns.items()},
        )

    def moved(self, move: Move) -> MicroBatch:
        """The same, with each of its tensors given to `move`."""
        positions_BS, attention_BS = self.positions_BS, self.attention_BS
        return replace(
            self,
            tokens_BS=move(self.tokens_BS),
            targets_BS=move(self.targets_BS),
            labels_N=move(self.labels_N),
            owners_N=move(self.owners_N),
            positions_BS=None if positions_BS is None else move(positions_BS),
            attention_BS=None if attention_BS is None else move(attention_BS),
            columns={name: move(values) for name, values in self.columns.items()},
            label_columns={name: move(values) for name, values in self.label_columns.items()},
            members_PE=None if self.members_PE is None else move(self.members_PE),
            examples=None if self.examples is None else self.examples.moved(move),
        )

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device, without waiting for the copies."""
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def model_inputs(self) -> dict[str, Tensor | bool]:
        """Keyword arguments of a Hugging Face model's forward."""
        inputs: dict[str, Tensor | bool] = {"input_ids": self.tokens_BS, "use_cache": False}
        if self.positions_BS is not None:
            inputs["position_ids"] = self.positions_BS
        if self.attention_BS is not None:
            inputs["attention_mask"] = self.attention_BS
        return inputs

    def repeated(self, times: int) -> MicroBatch:
        """All rows `times` times, with the same examples."""
        rows, copies = len(self.tokens_BS), range(times)

        def again(rows: Tensor | None) -> Any:
            return None if rows is None else rows.repeat(times, 1)

        def shifted(numbers: Tensor, by: int) -> Tensor:
            return torch.cat([numbers + time * by for time in copies], -1)

        return MicroBatch(
            self.tokens_BS.repeat(times, 1),
            self.targets_BS.repeat(times, 1),
            shifted(self.labels_N, self.tokens_BS.numel()),
            shifted(self.owners_N, len(self.spans)),
            again(self.positions_BS),
            again(self.attention_BS),
            tuple(
                replace(span, row=span.row + time * rows) for time in copies for span in self.spans
            ),
            self.virtual,
            {name: again(values) for name, values in self.columns.items()},
            self.indices * times,
            self.prompts * times,
            self.labels * times,
            self.places * times,
            {name: values.repeat(times) for name, values in self.label_columns.items()},
            None if self.members_PE is None else shifted(self.members_PE, len(self.spans)),
        )

    def group(self, number: int, groups: int) -> MicroBatch:
        """One of `groups` equal numbers of rows, whose examples have no sequence in another."""
        height, width = len(self.tokens_BS) // groups, self.tokens_BS.shape[1]
        rows = slice(number * height, (number + 1) * height)
        ends = [
            bisect_left(self.spans, row, key=attrgetter("row")) for row in (rows.start, rows.stop)
        ]
        spans = slice(*ends)
        labels = slice(*(sum(self.labels[:end]) for end in ends))
        examples = slice(*(end // self.parts for end in ends))
        members_PE = self.members_PE

        def own(rows_BS: Tensor | None) -> Tensor | None:
            return None if rows_BS is None else rows_BS[rows]

        return MicroBatch(
            self.tokens_BS[rows],
            self.targets_BS[rows],
            self.labels_N[labels] - rows.start * width,
            self.owners_N[labels] - spans.start,
            own(self.positions_BS),
            own(self.attention_BS),
            tuple(replace(span, row=span.row - rows.start) for span in self.spans[spans]),
            self.virtual,
            {name: values[examples] for name, values in self.columns.items()},
            self.indices[examples],
            self.prompts[spans],
            self.labels[spans],
            self.places[examples],
            {name: values[labels] for name, values in self.label_columns.items()},
            None if members_PE is None else members_PE[:, examples] - spans.start,
        )

    def unpacked(self, pad_token: int) -> MicroBatch:
        """The same sequences in the same order, one per row."""
        if self.positions_BS is None:
            return self
        lengths = [span.shared + span.stop - span.start for span in self.spans]
        shape = (len(lengths), max(lengths))
        tokens_ES = self.tokens_BS.new_full(shape, pad_token)
        targets_ES = self.targets_BS.new_full(shape, NO_TARGET)
        attention_ES = torch.zeros_like(tokens_ES)
        for row, (span, length) in enumerate(zip(self.spans, lengths, strict=True)):
            prompt = slice(span.prompt, span.prompt + span.shared)
            own = slice(span.start, span.stop)
            tokens_ES[row, : span.shared] = self.tokens_BS[span.row, prompt]
            tokens_ES[row, span.shared : length] = self.tokens_BS[span.row, own]
            targets_ES[row, span.shared : length] = self.targets_BS[span.row, own]
            attention_ES[row, :length] = 1
        spans = tuple(
            Span(row, 0, length, span.sequence)
            for row, (span, length) in enumerate(zip(self.spans, lengths, strict=True))
        )
        width = self.tokens_BS.shape[1]
        shifts_E = [
            row * shape[1] + span.shared - (span.row * width + span.start)
            for row, span in enumerate(self.spans)
        ]
        moved_E = torch.tensor(shifts_E).to(self.labels_N.device, non_blocking=True)
        return replace(
            self,
            tokens_BS=tokens_ES,
            targets_BS=targets_ES,
            labels_N=self.labels_N + moved_E.index_select(0, self.owners_N),
            examples=None,
            positions_BS=None,
            attention_BS=attention_ES,
            spans=spans,
        )

    def by_token(self, values_E: Tensor) -> Tensor:
        """`[B, S]`: for every token the value of its span, 0 for padding."""
        values_BS = values_E.new_zeros(tuple(self.tokens_BS.shape))
        for span, value in zip(self.spans, values_E, strict=True):
            values_BS[span.row, span.start : span.stop] = value
        return values_BS


def collate(
    split: TokenizedSplit,
    indices: Sequence[int] | Indices,
    layout: MicroLayout,
    pad_token: int,
    device: torch.device,
    virtual: int = 0,
    share: bool = False,
) -> MicroBatch:
    """Write the sequences of the examples `indices` of `split` into the rows of `layout`, with room
    for `virtual` tokens before each of them. With `share`, a row holds the prompt of several of its
    sequences once; see `prompts_in`.

    An empty layout gives one token without a target: a forward pass of weight zero, for ranks that
    have no examples left while others still communicate. An empty row holds only padding.
    """
    counts_B = np.array([len(row) for row in layout] or [0])
    ordered = [number for row in layout for number in row]
    chosen_Q = parts_of(indices, split.parts)[ordered]
    begins = split.part_offsets
    lengths_Q = begins[chosen_Q + 1] - begins[chosen_Q] + virtual
    rows_Q = np.repeat(np.arange(len(counts_B)), counts_B)
    shared_Q, firsts_Q = np.zeros_like(lengths_Q), np.arange(len(lengths_Q))
    if share:
        shared_Q, firsts_Q = shared_in(prompts_in(split, chosen_Q), rows_Q)
    own_Q = lengths_Q - shared_Q
    used_B = np.bincount(rows_Q, own_Q, minlength=len(counts_B)).astype(np.int64)
    begins_Q = np.cumsum(own_Q) - own_Q
    starts_Q = begins_Q - (np.cumsum(used_B) - used_B)[rows_Q]
    width = max(int(used_B.max()), 1)

    # For each token (T of them): its place in its sequence, in its row and in the split.
    offsets_T = np.arange(own_Q.sum()) - np.repeat(begins_Q - shared_Q, own_Q)
    places_T = np.repeat(rows_Q * width + starts_Q - shared_Q, own_Q) + offsets_T
    sources_T = np.repeat(begins[chosen_Q], own_Q) + offsets_T - virtual
    real_T = offsets_T >= virtual
    followed_T = real_T & (offsets_T + 1 < np.repeat(lengths_Q, own_Q))
    nexts_T = sources_T[followed_T] + 1

    shape = (len(counts_B), width)
    columns_S = np.arange(width)
    tokens_BS = np.full(shape, pad_token, np.int64)
    targets_BS = np.full(shape, NO_TARGET, np.int64)
    # Padding is documents of its own: under a mask made from positions no sequence attends to it.
    # None is longer than the longest sequence, by which some models choose their frequencies.
    positions_BS = (columns_S - used_B[:, None]) % max(lengths_Q.max(initial=1), 1)
    tokens_BS.flat[places_T[real_T]] = split.input_ids[sources_T[real_T]]
    labelled_T = split.label_mask[nexts_T]
    labels_N = places_T[followed_T][labelled_T]
    targets_BS.flat[labels_N] = split.input_ids[nexts_T[labelled_T]]
    owners_T = np.repeat(np.arange(len(lengths_Q)), own_Q)
    positions_BS.flat[places_T] = offsets_T
    # An empty row still attends to one token: attention over no token gives NaN.
    attention_BS = (columns_S < np.maximum(used_B, 1)[:, None]).astype(np.int64)
    packed = bool((counts_B > 1).any())
    padded = bool((attention_BS == 0).any())
    spans = tuple(
        map(
            Span,
            rows_Q.tolist(),
            starts_Q.tolist(),
            (starts_Q + own_Q).tolist(),
            ordered,
            shared_Q.tolist(),
            np.where(shared_Q > 0, starts_Q[firsts_Q], 0).tolist(),
        )
    )

    label_owners_N = owners_T[followed_T][labelled_T]
    prompts_Q = lengths_Q.copy()
    # The target at a position is the token after it.
    np.minimum.at(prompts_Q, label_owners_N, offsets_T[followed_T][labelled_T] + 1)

    places, members_PE = ordered, None
    if split.parts > 1:
        members_PE = np.argsort(ordered, kind="stable").reshape(-1, split.parts).T
        places = (np.array(sorted(ordered)[:: split.parts], np.int64) // split.parts).tolist()
    own_E = np.asarray(indices, np.int64)[places]
    label_columns = {}
    if split.label_columns:
        numbers_N = np.arange(len(label_owners_N)) + (
            split.part_labels[chosen_Q][label_owners_N]
            - np.searchsorted(label_owners_N, label_owners_N)
        )
        label_columns = {name: values[numbers_N] for name, values in split.label_columns.items()}

    tensor = torch.from_numpy
    batch = MicroBatch(
        tensor(tokens_BS),
        tensor(targets_BS),
        tensor(labels_N),
        tensor(label_owners_N),
        tensor(positions_BS) if packed else None,
        tensor(attention_BS) if padded and not packed else None,
        spans,
        virtual,
        {name: tensor(values[own_E]) for name, values in split.columns.items()},
        tuple(own_E.tolist()),
        tuple(prompts_Q.tolist()),
        tuple(np.bincount(label_owners_N, minlength=len(chosen_Q)).tolist()),
        tuple(places),
        {name: tensor(values) for name, values in label_columns.items()},
        None if members_PE is None else tensor(np.ascontiguousarray(members_PE)),
    )
    return batch.to(device)


def shared_in(prompts: Sequence[SharedPrompt], rows: Indices) -> tuple[Indices, Indices]:
    """For each sequence, in the order of rows: how many tokens it has in common with the first
    sequence of its row that begins with the same prompt, and which that is; itself and 0 where it
    is the first.
    """
    seen: dict[tuple[int, bytes], int] = {}
    firsts = [
        seen.setdefault((row, prompt.ids), place)
        for place, (row, prompt) in enumerate(zip(rows.tolist(), prompts, strict=True))
    ]
    shared = [
        prompt.tokens if first < place else 0
        for place, (first, prompt) in enumerate(zip(firsts, prompts, strict=True))
    ]
    return np.array(shared, np.int64), np.array(firsts, np.int64)
