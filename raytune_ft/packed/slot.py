"""One slot of the engine: the run in it, its adapter as checkpoints see it, its open step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import MicroBatch, Row
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.objectives import Columns, Forward, Objective
from raytune_ft.model.objectives.base import OfLogps
from raytune_ft.model.objectives.preference import label_logps
from raytune_ft.packed.lora import AdapterInit, MultiLora
from raytune_ft.packed.optim import PackedAdamW, Step
from raytune_ft.strategy.side_channel import SideChannel
from raytune_ft.tensors.write import Part
from raytune_ft.train.material import Material, Work
from raytune_ft.train.run_state import RunState
from raytune_ft.train.speaker import Answered, Turn


class OpenStep:
    """An optimizer step of one slot: its examples that no pass has taken yet, widest first.

    `widths_m` has the tokens of a row that each of the step's examples takes, `examples` counts
    these, `count` divides their losses, and `loss_sum` is the sum of the losses that this rank has
    computed so far, on its device.
    """

    def __init__(self, work: Work, widths_m: Indices, objective: Objective) -> None:
        order = np.argsort(-widths_m, kind="stable")
        self.work, self._waiting, self._widths = work, work.indices[order], widths_m[order]
        self.examples, self.objective = len(work.indices), objective
        self.count = objective.count(work.split, work.indices) or 1
        self.loss_sum: Tensor | float = 0.0

    @property
    def waiting_widths(self) -> list[int]:
        """Of the examples that wait, widest first."""
        widths: list[int] = self._widths.tolist()
        return widths

    @property
    def waiting_tokens(self) -> int:
        """Those of the examples that wait."""
        return int(self.work.split.lengths[self._waiting].sum())

    def take(self, rows: Sequence[Row]) -> list[list[int]]:
        """Remove the examples at these positions of `waiting_widths`; their indices, by row."""
        taken = [self._waiting[list(row)].tolist() if row else [] for row in rows]
        left = np.ones(len(self._waiting), bool)
        left[[position for row in rows for position in row]] = False
        self._waiting, self._widths = self._waiting[left], self._widths[left]
        return taken


def together(objectives: Sequence[Objective]) -> Objective:
    """The objective of a batch that has equally many rows for each of these, in their order.

    Different ones are all `OfLogps`, with one temperature.
    """
    first = objectives[0]
    if all(each == first for each in objectives):
        return first
    return EachItsOwn(tuple(each for each in objectives if isinstance(each, OfLogps)))


@dataclass(frozen=True)
class EachItsOwn(Objective):
    """Losses and columns of each slot by its own objective, from one pass through the model.

    The objectives read the same outputs of the model.
    """

    of_tokens: ClassVar[bool] = True
    objectives: tuple[OfLogps, ...]

    def over(self, split: TokenizedSplit, indices: Indices, forward: Forward) -> Objective:
        return together([each.over(split, indices, forward) for each in self.objectives])

    def count(self, split: TokenizedSplit, indices: Indices) -> float:
        return self.objectives[0].count(split, indices)

    def losses(self, forward: Forward, batch: MicroBatch) -> Tensor:
        """`[E]`, in the order of the slots."""
        return torch.cat(
            [own.losses_of(logps_N, part) for own, logps_N, part in self._parts(forward, batch)]
        )

    def columns(self, forward: Forward, batch: MicroBatch, groups: int) -> Columns:
        """`[G, E]` each."""
        found = [
            own.columns_of(logps_N, part) for own, logps_N, part in self._parts(forward, batch)
        ]
        return Columns(
            examples={name: torch.stack([each[name] for each in found]) for name in found[0]}
        )

    def known(self, split: TokenizedSplit, indices: Indices) -> dict[str, npt.NDArray[Any]]:
        return self.objectives[0].known(split, indices)

    def _parts(
        self, forward: Forward, batch: MicroBatch
    ) -> list[tuple[OfLogps, Tensor, MicroBatch]]:
        """Each objective with the log-probabilities and the part of the batch that are its own."""
        temperature, slots = self.objectives[0].temperature, len(self.objectives)
        logps_N = label_logps(forward, batch, temperature)
        parts = [batch.group(number, slots) for number in range(slots)]
        own = logps_N.split([len(part.labels_N) for part in parts])
        return list(zip(self.objectives, own, parts, strict=True))


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
    """A run's place in the engine: its state, its adapter, and the step that passes work on.

    `open` is None while the run waits for the answers to `turn`, which its next step needs.
    """

    def __init__(
        self,
        run: RunState,
        adapter: AdapterInit,
        holder: SlotHolder,
        objective: Objective,
        material: Material,
        open_step: Callable[[Objective, Work], OpenStep],
    ) -> None:
        self.run, self.adapter, self.holder, self.objective = run, adapter, holder, objective
        self.material, self._open_step = material, open_step
        self.open: OpenStep | None = None
        self.turn: Turn | None = None
        self.begin_step()

    def begin_step(self) -> None:
        """Open the next step of the run, where it has one and needs no answers."""
        self.open = self.turn = None
        if self.run.over:
            return
        self.turn = self.material.turn(self.run, self.run.step)
        if self.turn is None:
            self._begin()

    def hear(self, answered: Answered) -> None:
        """Open the step that needs these answers."""
        assert self.turn is not None
        self.material.hear(self.run, self.run.step, self.turn, answered)
        self._begin()

    def _begin(self) -> None:
        self.open = self._open_step(self.objective, self.material.work(self.run, self.run.step))

    def optimizer_step(self) -> Step:
        """What the optimizer does with this slot once no example of the step waits."""
        return Step(self.holder.slot, self.run.lr, self.run.spec.config.train)
