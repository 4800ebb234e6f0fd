"""Passes through one frozen base with the adapters of several slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.schema import Config
from raytune_ft.data.layout import Row
from raytune_ft.data.order import Indices
from raytune_ft.data.prepare import PreparedData
from raytune_ft.errors import InputError
from raytune_ft.model.drawn import Drawn, draw_adapter
from raytune_ft.model.meta import build_base, shapes_of
from raytune_ft.packed.autotune import (
    fewest_near_best,
    seconds_a_token,
    slots_in,
    told,
    worth_trying,
)
from raytune_ft.packed.layout import PackedPass, plan_pass
from raytune_ft.packed.lora import MultiLora, Window
from raytune_ft.packed.optim import PackedAdamW, Step
from raytune_ft.strategy import Strategy
from raytune_ft.train.evaluation import Scores, evaluate, evaluate_groups
from raytune_ft.train.objective import build_objective
from raytune_ft.train.packed_open import OpenStep
from raytune_ft.train.packed_step import accumulate_packed
from raytune_ft.train.setup import build_engine, check_vocabulary
from raytune_ft.train.stream import plain_order
from raytune_ft.train.watchdog import Beat


def _of_nothing(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The base is frozen, and the slots have an optimizer of their own."""
    return torch.optim.SGD([{"params": list(parameters)}])


class Passes:
    """The model, laid out over ranks, and the numbers of all slots, which every rank has whole.

    The rows of a pass are shared out over ranks. All of them make the same calls.

    Raises:
        ModelError: see `build_engine`.
        ConfigError: likewise.
    """

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        slots: int,
        largest_rank: int,
        strategy: Strategy,
        beat: Beat,
    ) -> None:
        self._config, self._data, self._beat = config, data, beat
        self.slots = slots
        built = build_base(config.model, config.train.precision, strategy.takes_parts)
        base = built.model
        check_vocabulary(base, data)
        self.shapes = shapes_of(base)
        self.optimizer = PackedAdamW(slots, strategy)
        objective = build_objective(config, data, strategy)
        self.engine = build_engine(built, config, strategy, _of_nothing, objective)
        self._dtype = getattr(torch, config.train.precision)
        # Selective checkpointing keeps results of products, which must then stay as they are.
        in_place = config.parallel.activation_checkpointing != "selective"
        self.stack = MultiLora(base, largest_rank, in_place)

    def settle(self, memory: int | None, measured: bool) -> str:
        """Before the first run: keep as many slots as `memory` bytes hold, None where nobody knows,
        and if `measured` as few as make tokens cheap. Says what for, to people.

        The engine's own config is taken for that of the runs to come.
        """
        config, strategy, optimizer = self._config, self.engine.strategy, self.optimizer
        assert isinstance(config.method, LoraMethod)
        try:
            drawn = draw_adapter(self.shapes, config.method, config.train.precision, config.seed)
        except InputError as error:  # which is that of the trials that have it
            return f"{self.slots} slots (not tried: {error})"
        self.stack.adapt(list(drawn.layers))
        why = "as written"
        if memory is not None:
            room = self._fit_everywhere(
                slots_in(memory, self.stack, optimizer.numbers_KN.dtype, strategy.device)
            )
            if room < self.slots:
                self.slots, why = room, f"memory holds {room}"
        optimizer.keep(self.slots)
        if measured:
            optimizer.widen(self.stack.numbers)
            step_tokens = round(self._data.train.lengths.mean() * config.train.batch_size)
            pass_tokens = self.engine.micro_tokens * strategy.world_size
            counts = worth_trying(self.slots, step_tokens, pass_tokens)
            seconds = seconds_a_token(partial(self._try, drawn), counts, strategy.agree)
            self.slots, why = fewest_near_best(seconds), told(seconds)
            optimizer.keep(self.slots)
        return f"{self.slots} slot{'s' * (self.slots != 1)} ({why})"

    def _fit_everywhere(self, here: int) -> int:
        """Slots on the rank with the least room: shards are uneven, and so are hosts."""
        strategy = self.engine.strategy
        fit_K = [float(count <= here) for count in range(1, self.slots + 1)]
        ranks_K = strategy.sum(torch.tensor(fit_K, device=strategy.device))
        return max(1, int((ranks_K == strategy.world_size).sum()))

    def _try(self, drawn: Drawn, count: int) -> int:
        """A pass with so many slots and what follows it; how many tokens that were."""
        settings, data, optimizer = self._config.train, self._data.train, self.optimizer
        batch, order = settings.batch_size, plain_order(self._config, data)
        steps = [self.open(order.indices(number * batch, batch)) for number in range(count)]
        plan = self.plan(steps, 0)
        steps = steps[: len(plan.rows)]
        self.accumulate(plan, steps, self.window(0, [drawn] * len(steps)))
        optimizer.step([Step(slot, 0.0, settings) for slot in range(len(steps))])
        return sum(step.tokens - sum(step.waiting_lengths) for step in steps)

    def open(self, indices: Indices) -> OpenStep:
        """A step over these training examples, none of which has been seen yet."""
        data = self._data.train
        return OpenStep(data, indices, self.engine.objective.count(data, indices) or 1)

    def plan(self, steps: Sequence[OpenStep], first: int) -> PackedPass:
        """The pass that begins with slot `first`; see `plan_pass`."""
        waiting = [step.waiting_lengths for step in steps]
        engine = self.engine
        ranks = engine.strategy.world_size
        return plan_pass(waiting, first, engine.micro_tokens, engine.packing, ranks)

    def accumulate(self, plan: PackedPass, steps: Sequence[OpenStep], window: Window) -> None:
        """Run a pass; gradients and losses are added where they belong."""
        engine = self.engine
        rank, ranks = engine.strategy.rank, engine.strategy.world_size
        examples: list[int] = []
        layout: list[Row] = []
        for step, rows in zip(steps, plan.rows, strict=True):
            for row in step.take(rows)[rank::ranks]:
                layout.append(tuple(range(len(examples), len(examples) + len(row))))
                examples += row
        batch = engine.collate(self._data.train, np.array(examples), tuple(layout))
        counts = [step.count for step in steps]
        sums = accumulate_packed(engine, self.stack, window, batch, counts)
        for step, loss_sum in zip(steps, sums, strict=True):
            step.loss_sum += loss_sum

    def window(self, first: int, drawn: Sequence[Drawn]) -> Window:
        """Those adapters in the slots from `first` on, to be trained."""
        slots = slice(first, first + len(drawn))
        optimizer = self.optimizer
        return self._over(optimizer.numbers_KN[slots], optimizer.gradients_KN[slots], drawn)

    def scores(self, slots: Sequence[int], drawn: Sequence[Drawn]) -> list[Scores]:
        """Of those adapters in those slots, together."""
        numbers_GN = self.optimizer.numbers_KN[list(slots)]
        with self.stack.applied(self._over(numbers_GN, None, drawn)):
            return evaluate_groups(self.engine, self._data.validation, len(slots), self._beat)

    def base_scores(self) -> Scores:
        """Of the base without any adapter."""
        return evaluate(self.engine, self._data.validation, self._beat)

    def _over(
        self, numbers_GN: Tensor, gradients_GN: Tensor | None, drawn: Sequence[Drawn]
    ) -> Window:
        scales_G = torch.tensor([each.scale for each in drawn], dtype=numbers_GN.dtype)
        return Window(
            self.stack.places,
            numbers_GN,
            gradients_GN,
            scales_G.to(numbers_GN.device),
            max(each.rank for each in drawn),
            self._dtype,
        )
