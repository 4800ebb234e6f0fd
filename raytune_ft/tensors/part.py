"""What one process holds of a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One unbroken range of a tensor that is read row by row.

    Every sharding in use cuts tensors so: fsdp between rows, ZeRO anywhere. `values` `[n]` is a
    view of the live storage; what is copied into it is trained with. `shape` is the whole
    tensor's. `writes`: this rank saves the range, where several hold the same.
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor
    writes: bool = True

    @property
    def end(self) -> int:
        """The first element that this part does not have."""
        return self.start + self.values.numel()

    @property
    def whole(self) -> bool:
        """Is it all of the tensor?"""
        return self.values.numel() == math.prod(self.shape)
