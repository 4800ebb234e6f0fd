"""One slot of the engine: the run in it, its adapter as checkpoints see it, its open step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from raytune_ft.data.batch import Row
from raytune_ft.data.order import Indices
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.packed.lora import AdapterInit, MultiLora
from raytune_ft.packed.optim import PackedAdamW, Step
from raytune_ft.strategy.side_channel import SideChannel
from raytune_ft.tensors.write import Part
from raytune_ft.train.run_state import RunState


class OpenStep:
    """An optimizer step of one slot: its examples that no pass has taken yet, longest first.

    `examples` and `tokens` count those of the whole step, `count` divides its losses, and
    `loss_sum` is the sum of the losses that this rank has computed so far, on its device.
    """

    def __init__(self, data: TokenizedSplit, indices: Indices, count: float) -> None:
        self._data, self.count = data, count
        lengths = data.lengths[indices]
        self._waiting = indices[np.argsort(-lengths, kind="stable")]
        self.waiting_lengths: list[int] = data.lengths[self._waiting].tolist()
        self.examples, self.tokens = len(indices), int(lengths.sum())
        self.loss_sum: Tensor | float = 0.0

    def take(self, rows: Sequence[Row]) -> list[list[int]]:
        """Remove the examples at these positions of `waiting_lengths`; their indices, by row."""
        taken = [self._waiting[list(row)].tolist() if row else [] for row in rows]
        left = np.ones(len(self._waiting), bool)
        left[[position for row in rows for position in row]] = False
        self._waiting = self._waiting[left]
        self.waiting_lengths = self._data.lengths[self._waiting].tolist()
        return taken


class SlotHolder:
    """Weights and moments of one slot of the stack, under PEFT's names: a `Holder`.

    The weights begin as they were adapter. `slot` changes when the run moves to another slot.
    """

    def __init__(
        self,
        stack: MultiLora,
        optimizer: PackedAdamW,
        adapter: AdapterInit,
        slot: int,
        channel: SideChannel,
    ) -> None:
        self._stack, self._optimizer, self._rank = stack, optimizer, adapter.rank
        self.slot, self._channel = slot, channel
        self.names = list(adapter.weights)
        self._slices = {
            name: (stack.slices[layer], which)
            for layer, names in adapter.layers.items()
            for which, name in enumerate((names.a, names.b))
        }
        self._filling: list[tuple[Tensor, Tensor]] | None = None
        optimizer.clear(slot)
        for name, weight in adapter.weights.items():
            self._view(optimizer.numbers_KN, name).copy_(weight)

    @property
    def device(self) -> torch.device:
        return self._optimizer.numbers_KN.device

    def start_from(self, step: int) -> None:
        self._optimizer.steps_K[self.slot] = step
        self._filling = []

    def parts(self, name: str) -> dict[str, Part]:
        """Copies in PEFT's shapes. What is filled into them between `start_from` and `loaded` is
        written to the slot. Every rank has all of them; rank 0 saves them.
        """
        rows = {
            "": self._optimizer.numbers_KN,
            "exp_avg": self._optimizer.exp_avg_KN,
            "exp_avg_sq": self._optimizer.exp_avg_sq_KN,
        }
        found = {}
        for key, numbers_KN in rows.items():
            view = self._view(numbers_KN, name)
            values = view.clone(memory_format=torch.contiguous_format)
            if self._filling is not None:
                self._filling.append((view, values))
            shape, writes = tuple(values.shape), self._channel.rank == 0
            found[key] = Part(shape, 0, values.view(-1), writes)
        return found

    def loaded(self) -> None:
        for view, values in self._filling or ():
            view.copy_(values)
        self._filling = None

    def side_channel(self) -> SideChannel:
        """The one line of all slots: their checkpoints are written one after another."""
        return self._channel

    def _view(self, numbers_KN: Tensor, name: str) -> Tensor:
        """`A_RI` or `B_OR` at the slot's own rank."""
        place, which = self._slices[name]
        pair = place.pair(numbers_KN[self.slot : self.slot + 1])
        values_RX = pair[which][0, : self._rank]
        return values_RX.t() if which else values_RX


class Slot:
    """A run's place in the engine: its state, its adapter, and the step that passes work on."""

    def __init__(
        self,
        run: RunState,
        adapter: AdapterInit,
        holder: SlotHolder,
        open_step: Callable[[Indices], OpenStep],
    ) -> None:
        self.run, self.adapter, self.holder = run, adapter, holder
        self._open_step = open_step
        self.begin_step()

    def begin_step(self) -> None:
        """Open the next step of the run, where it has one."""
        if not self.run.over:
            self.open = self._open_step(self.run.next_batch())

    def optimizer_step(self) -> Step:
        """What the optimizer does with this slot once no example of the step waits."""
        return Step(self.holder.slot, self.run.lr, self.run.spec.config.train)
