"""Where DeepSpeed's ZeRO optimizers keep the master weights of a parameter.

Both kinds hold them flat, in one tensor for each group of parameters, and give Adam that tensor in
place of the parameters. Read from the source of DeepSpeed 0.19; none of it is a public interface.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Range:
    """Elements of a parameter, from `start` on, lie in `flat` between `low` and `high`."""

    start: int
    flat: Tensor
    low: int
    high: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same elements of a tensor laid out as `flat` is, such as a moment."""
        return tensor.detach()[self.low : self.high]


class Zero(Protocol):
    """What is asked of either kind."""

    def flats(self) -> Iterable[Tensor]:
        """The tensors that Adam steps on this rank."""

    def range_of(self, parameter: nn.Parameter) -> Range:
        """What this rank holds of a parameter, without padding; nothing is an empty range."""

    def refresh(self) -> None:
        """Make what the forward pass uses of the master weights; every rank must call this."""


class Zero12:
    """Stages 1 and 2: whole weights on every rank, master weights and moments cut in slices.

    A group's parameters lie end to end, with gaps where they are aligned; every rank has a slice
    of the same length, the last of them ending in padding.
    """

    def __init__(self, optimizer: Any, rank: int) -> None:
        self._optimizer = optimizer
        self._ranges: dict[nn.Parameter, Range] = {}
        groups = zip(
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.partition_size,
            self.flats(),
            strict=True,
        )
        for parameters, offsets, size, flat in groups:
            left = rank * size
            for parameter, offset in zip(parameters, offsets, strict=True):
                low = min(max(offset, left), left + size)
                high = max(low, min(offset + parameter.numel(), left + size))
                start = low - offset if high > low else 0
                self._ranges[parameter] = Range(start, flat, low - left, high - left)

    def flats(self) -> Iterable[Tensor]:
        """See `Zero.flats`."""
        flats: list[Tensor] = self._optimizer.single_partition_of_fp32_groups
        return flats

    def range_of(self, parameter: nn.Parameter) -> Range:
        """See `Zero.range_of`."""
        return self._ranges[parameter]

    def refresh(self) -> None:
        """See `Zero.refresh`."""
        self._optimizer.update_lp_params()


class Zero3:
    """Stage 3: of every parameter each rank has one slice, the last ones ending in padding."""

    def __init__(self, optimizer: Any, rank: int) -> None:
        self._optimizer, self._rank = optimizer, rank

    def flats(self) -> Iterable[Tensor]:
        """See `Zero.flats`."""
        flats: list[Tensor] = self._optimizer.fp32_partitioned_groups_flat
        return flats

    def range_of(self, parameter: nn.Parameter) -> Range:
        """See `Zero.range_of`."""
        whole: int = parameter.ds_numel  # type: ignore[attr-defined]
        place = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        group, low, size = place
        start = min(self._rank * size, whole)
        flat = self._optimizer.fp32_partitioned_groups_flat[group]
        return Range(start, flat, low, low + min(size, whole - start))

    @torch.no_grad()
    def refresh(self) -> None:
        """As the end of a step does; weights that a forward pass left gathered are dropped."""
        optimizer = self._optimizer
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
