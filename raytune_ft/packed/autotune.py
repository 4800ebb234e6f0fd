"""The number of slots of an engine: at most what memory holds, as few as keep tokens cheap."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import linear_regression
from typing import Any

import torch

from raytune_ft.packed.lora import MultiLora

NEAR = 1.05
"""A token may take this times the least: fewer trials at a time help the search more than that."""
FEWEST_TRIES, MOST_TRIES = 3, 10
"""Passes measured for each number of slots: until the two fastest of each agree within `NEAR`."""
LARGE_S = 0.3
"""A pass that takes this long is large enough: more slots are not tried."""
COPIES = {"cpu": 8, "cuda": 6}
"""Memory of one adapter, as a multiple of its master weights: weights, gradients, two moments, the
copies that an evaluation takes, and on a CPU the snapshot of a checkpoint, on a GPU the copy in
the precision of the computation."""
SHARE = 0.5
"""The adapters' share of the memory beside the base. Activations have the rest; they do not grow
with the number of slots, because `train.micro_tokens` bounds them."""


def slots_in(memory: int, stack: MultiLora, dtype: torch.dtype, device: torch.device) -> int:
    """The number of adapters that fit into `memory` bytes beside this rank's part of the base, at
    least one. `dtype` is that of the master weights.
    """
    parts = [getattr(each, "_local_tensor", each) for each in stack.model.parameters()]
    base = sum(part.numel() * part.itemsize for part in parts)
    of_slot = max(1, stack.numbers * dtype.itemsize * COPIES[device.type])
    return max(1, int(SHARE * (memory - base) // of_slot))


def worth_trying(most: int, step_tokens: int, pass_tokens: int) -> list[int]:
    """The numbers of slots to measure: powers of two up to `most` whose steps fit a pass.

    With more slots a pass does not become larger.
    """
    counts = [2**power for power in range(most.bit_length())]
    if counts[-1] != most:
        counts.append(most)
    return [count for count in counts if count == 1 or count * step_tokens <= pass_tokens]


def seconds_a_token(
    one_pass: Callable[[int], int],
    counts: Sequence[int],
    from_rank0: Callable[[Any], Any],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float] | None:
    """Seconds a token for each number of slots, in its fastest pass; None where the times of equal
    passes differ too much, as on a machine that is busy. `one_pass` runs a pass and returns its
    tokens.

    Ranks use the clock of rank 0.
    """
    found: dict[int, list[float]] = {}
    for tried in range(1, MOST_TRIES + 1):
        for count in counts:  # interleaved: a busy moment slows all counts
            if count not in found:
                one_pass(count)  # the first of a shape loads and chooses kernels
            at = clock()
            tokens = one_pass(count)
            found.setdefault(count, []).append((clock() - at) / tokens)
            if from_rank0(min(found[count]) * tokens >= LARGE_S):
                break
        # Where its passes are large, twice in a row, nothing else is compared.
        alone = len(found) == 1 and tried > 1
        if from_rank0(alone or (tried >= FEWEST_TRIES and _agree(found))):
            return dict(from_rank0({count: min(times) for count, times in found.items()}))
    return None


def _agree(found: Mapping[int, Sequence[float]]) -> bool:
    """Whether the two fastest passes of every number of slots took about the same time."""
    fastest = [sorted(times)[:2] for times in found.values()]
    return all(len(two) == 2 and two[1] <= NEAR * two[0] for two in fastest)


def fewest_near_best(seconds: Mapping[int, float]) -> int:
    """The fewest slots whose time a token is within `NEAR` of the least."""
    best = min(seconds.values())
    return min(count for count, each in seconds.items() if each <= NEAR * best)


def fixed_tokens(passes: Mapping[float, float], most: int) -> int | None:
    """What a pass costs beside its tokens, in tokens: a line through the seconds of `passes`, by
    the number of their tokens. None from passes of one size.

    Time per token stops falling, to within `NEAR`, at 1 / (`NEAR` - 1) times as many. Where larger
    passes take no longer, or nearly so, it is `most`.
    """
    if len(passes) < 2:
        return None
    tokens, taken = list(passes), list(passes.values())
    slope, intercept = linear_regression(tokens, taken)
    if intercept <= 0:
        return 0
    return most if intercept >= most * slope else round(intercept / slope)


def describe(seconds: Mapping[int, float]) -> str:
    """A progress line: `a token takes 93 us with 1, 54 us with 2`."""
    shown = [f"{each * 1e6:.3g} us with {count}" for count, each in seconds.items()]
    return "a token takes " + ", ".join(shown)
