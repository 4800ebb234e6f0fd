"""One slot of the stacked adapters as a run's checkpoints see it: weights and moments of PEFT."""

from __future__ import annotations

import torch
from torch import Tensor

from raytune_ft.model.drawn import Drawn
from raytune_ft.packed.lora import MultiLora
from raytune_ft.packed.optim import PackedAdamW
from raytune_ft.strategy.exchange import Exchange
from raytune_ft.tensors.part import Part


class SlotHolder:
    """A `Holder` whose weights begin as they were drawn. `slot` changes when the run moves."""

    def __init__(
        self, stack: MultiLora, optimizer: PackedAdamW, drawn: Drawn, slot: int, line: Exchange
    ) -> None:
        self._stack, self._optimizer, self._rank = stack, optimizer, drawn.rank
        self.slot, self._line = slot, line
        self.names = list(drawn.weights)
        self._places = {
            name: (stack.places[layer], which)
            for layer, names in drawn.layers.items()
            for which, name in enumerate((names.a, names.b))
        }
        self._filling: list[tuple[Tensor, Tensor]] | None = None
        optimizer.clear(slot)
        for name, weight in drawn.weights.items():
            self._view(optimizer.numbers_KN, name).copy_(weight)

    @property
    def device(self) -> torch.device:
        """See `Holder.device`."""
        return self._optimizer.numbers_KN.device

    def start_from(self, step: int) -> None:
        """See `Holder.start_from`."""
        self._optimizer.steps_K[self.slot] = step
        self._filling = []

    def parts(self, name: str) -> dict[str, Part]:
        """Copies, as PEFT has them; what is filled into them between `start_from` and `loaded`
        goes to the slot. Every rank has all of them, and the first saves them.
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
            shape, writes = tuple(values.shape), self._line.rank == 0
            found[key] = Part(shape, 0, values.view(-1), writes)
        return found

    def loaded(self) -> None:
        """See `Holder.loaded`."""
        for view, values in self._filling or ():
            view.copy_(values)
        self._filling = None

    def exchange(self) -> Exchange:
        """That of all slots, whose checkpoints are written one after another."""
        return self._line

    def _view(self, numbers_KN: Tensor, name: str) -> Tensor:
        """`A_RI` or `B_OR` at the slot's own rank."""
        place, which = self._places[name]
        pair = place.pair(numbers_KN[self.slot : self.slot + 1])
        values_RX = pair[which][0, : self._rank]
        return values_RX.t() if which else values_RX
