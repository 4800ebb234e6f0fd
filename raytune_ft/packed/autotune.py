"""How many slots an engine gets: what its memory holds, and as few as make its tokens cheap."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import inf
from typing import Any

import torch

from raytune_ft.packed.lora import MultiLora

NEAR = 1.05
"""Of the least time a token: what a search gains by fewer trials at a time is worth the rest."""
TRIES, TRY_S = 3, 1.0
"""Passes of each number of slots, none of which begins later: passes that take so long are large
enough."""
COPIES = {"cpu": 8, "cuda": 6}
"""Of the numbers of an adapter, each as large as a master weight: weights, gradients, two moments
and those that an evaluation takes; on a CPU the snapshot that a checkpoint is written from, on a
GPU those that are computed with."""
SHARE = 0.5
"""Of the memory beside the base, for adapters. Activations have the rest, and do not grow with
the number of slots: `train.micro_tokens` bounds them."""


def slots_in(memory: int, stack: MultiLora, dtype: torch.dtype, device: torch.device) -> int:
    """How many adapters fit into `memory` bytes beside what this rank holds of the base; at least
    one. `dtype` is that of master weights.
    """
    parts = [getattr(each, "_local_tensor", each) for each in stack.model.parameters()]
    base = sum(part.numel() * part.itemsize for part in parts)
    of_slot = max(1, stack.numbers * dtype.itemsize * COPIES[device.type])
    return max(1, int(SHARE * (memory - base) // of_slot))


def worth_trying(most: int, step_tokens: int, pass_tokens: int) -> list[int]:
    """Numbers of slots up to `most` whose steps, together, fill no more than a pass.

    More of them make no pass larger.
    """
    counts = [2**power for power in range(most.bit_length())]
    if counts[-1] != most:
        counts.append(most)
    return [count for count in counts if count == 1 or count * step_tokens <= pass_tokens]


def seconds_a_token(
    one_pass: Callable[[int], int], counts: Sequence[int], agree: Callable[[Any], Any]
) -> dict[int, float]:
    """By the number of slots, from passes that are run here: `one_pass` returns their tokens.

    Ranks go by the clock of the first.
    """
    begun = time.perf_counter()
    one_pass(1)  # the first one of all takes longer
    found: dict[int, float] = {}
    for _, count in product(range(TRIES), counts):  # so that a busy moment meets all of them
        at = time.perf_counter()
        if found and not agree(at - begun < TRY_S):
            break
        tokens = one_pass(count)
        found[count] = min(found.get(count, inf), (time.perf_counter() - at) / tokens)
    return dict(agree(found))


def fewest_near_best(seconds: Mapping[int, float]) -> int:
    """The fewest slots with which a token takes about as little time as with any number."""
    best = min(seconds.values())
    return min(count for count, each in seconds.items() if each <= NEAR * best)


def told(seconds: Mapping[int, float]) -> str:
    """For people: `a token takes 93 us with 1, 54 us with 2`."""
    shown = [f"{each * 1e6:.3g} us with {count}" for count, each in seconds.items()]
    return "a token takes " + ", ".join(shown)
