"""The one stream of training examples, as a pure function of the seed.

Example `i` of the stream is `permutation(seed, i // n)[i % n]`, so any step of any run can be
computed without having read what came before it: resuming needs a counter, not a loader's state.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> Indices:
    """The order of `n` examples in one epoch; every epoch has its own."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def example_indices(seed: int, start: int, count: int, n: int) -> Indices:
    """Indices of stream positions `start .. start + count - 1`; they may straddle epochs."""
    parts = []
    position, end = start, start + count
    while position < end:
        epoch, offset = divmod(position, n)
        take = min(n - offset, end - position)
        parts.append(permutation(seed, epoch, n)[offset : offset + take])
        position += take
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
