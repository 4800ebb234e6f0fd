"""Many LoRA runs at once against one frozen base, in one process or on several ranks.

Each run is what it would be alone: the same `RunState` decides its order, schedule, end and
checkpoints. What differs from `train.loop`:

1. A step is spread over passes: a pass takes examples of several slots' open steps in one forward.
2. The adapters of all slots are stacked tensors (`lora`), with one AdamW over their rows (`optim`).
3. One pass makes several evaluations due, which one pass over the validation set answers.
4. A run enters a free slot and leaves it at its end, or when it fails; the others go on.
5. The base's own scores are computed once, for all runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from raytune_ft.config.execution import packable
from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.schema import Config
from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import FREELY, MicroBatch, Row
from raytune_ft.data.prepare import PreparedData
from raytune_ft.errors import ConfigError, InputError, RunFailed
from raytune_ft.model.export import Exporter
from raytune_ft.model.meta import build_base, shapes_of
from raytune_ft.model.objectives import Objective
from raytune_ft.packed.autotune import (
    describe,
    fewest_near_best,
    fixed_tokens,
    seconds_a_token,
    slots_in,
    worth_trying,
)
from raytune_ft.packed.layout import PASS_TOKENS, PackedPass, plan_pass
from raytune_ft.packed.lora import ActiveAdapters, AdapterInit, MultiLora, init_adapter
from raytune_ft.packed.optim import PackedAdamW, Step
from raytune_ft.packed.slot import OpenStep, Slot, SlotHolder, together
from raytune_ft.rundir import RunSpec
from raytune_ft.strategy import Strategy
from raytune_ft.train.evaluation import Scores, evaluate, evaluate_groups
from raytune_ft.train.model_runner import ModelRunner, choose_micro_tokens
from raytune_ft.train.report import Reporter
from raytune_ft.train.result import end_run, failed_result
from raytune_ft.train.setup import (
    build_objective,
    build_run_state,
    build_runner,
    plain_order,
)
from raytune_ft.train.watchdog import Beat, Heartbeat, no_beat


def _no_optimizer(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The strategy's optimizer has nothing to do: the base is frozen, `optim` moves the slots."""
    return torch.optim.SGD([{"params": list(parameters)}])


class Passes:
    """Passes through the base, laid out over ranks, with the adapters that every rank has whole.

    The rows of a pass are split over ranks. All ranks make the same calls.

    Raises:
        ModelError: see `build_runner`.
        ConfigError: see `build_runner`.
    """

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        slots: int,
        largest_rank: int,
        strategy: Strategy,
        beat: Beat = no_beat,
    ) -> None:
        """`config` has what all runs share: the model, its precision, the layout of passes."""
        self.config, self.data, self._beat = config, data, beat
        self.slots, self.fixed = slots, PASS_TOKENS
        built = build_base(config.model, config.train.precision, strategy.takes_parts)
        base = built.model
        self.shapes = shapes_of(base)
        self.optimizer = PackedAdamW(slots, strategy)
        objective = build_objective(config, data, strategy)
        room = choose_micro_tokens(config.train.micro_tokens, strategy.device)
        widest = max(room, data.widest)
        self.runner = build_runner(
            built, config, strategy, _no_optimizer, objective, data.extent, widest
        )
        if data.train.parts > 1 and self.runner.apart != FREELY:
            # A row of several pairs does not show the lengths that are kept apart.
            self.runner = replace(self.runner, packing=False)
        self._dtype = getattr(torch, config.train.precision)
        # Selective checkpointing keeps results of products, so they must not change in place.
        in_place = config.parallel.activation_checkpointing != "selective"
        self.stack = MultiLora(base, largest_rank, in_place)

    def settle(self, memory: int | None, measured: bool) -> str:
        """Choose the number of slots, before the first run; returns the choice and its reason.

        At most as many as `memory` bytes hold (None: unknown, no limit). If `measured`, the fewest
        with which a token costs about the least time; what a pass costs beside its tokens is found
        from the same passes, and decides which rows share one. The engine's config stands for the
        runs'.
        """
        config, strategy, optimizer = self.config, self.runner.strategy, self.optimizer
        assert isinstance(config.method, LoraMethod)
        try:
            adapter = init_adapter(self.shapes, config.method, config.train.precision, config.seed)
        except InputError as error:  # trials with this method will fail with it
            return f"{self.slots} slots (not measured: {error})"
        self.stack.adapt(list(adapter.layers))
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
            step_tokens = round(self.data.train.lengths.mean() * config.train.batch_size)
            pass_tokens = self.runner.micro_tokens * strategy.world_size
            counts = worth_trying(self.slots, step_tokens, pass_tokens)
            tokens: dict[int, int] = {}

            def one_pass(count: int) -> int:
                tokens[count] = self._try(adapter, count)
                return tokens[count]

            seconds = seconds_a_token(one_pass, counts, strategy.from_rank0)
            if seconds is None:
                why = "as planned: the machine is too busy to measure whether fewer are as fast"
            else:
                self.slots, why = fewest_near_best(seconds), describe(seconds)
                ranks, most = strategy.world_size, self.runner.micro_tokens
                passes = {tokens[count] / ranks: tokens[count] * s for count, s in seconds.items()}
                found = fixed_tokens(passes, most)
                if found is not None:
                    self.fixed, why = found, f"{why}; a pass costs {found:,} more"
            optimizer.keep(self.slots)
        return f"{self.slots} slot{'s' * (self.slots != 1)} ({why})"

    def _fit_everywhere(self, here: int) -> int:
        """The number of slots that fits on every rank; shards and hosts differ in size."""
        strategy = self.runner.strategy
        fit_K = [float(count <= here) for count in range(1, self.slots + 1)]
        ranks_K = strategy.sum(torch.tensor(fit_K, device=strategy.device))
        return max(1, int((ranks_K == strategy.world_size).sum()))

    def _try(self, adapter: AdapterInit, count: int) -> int:
        """Run a pass with `count` slots and its optimizer step; the number of its tokens."""
        settings, data, optimizer = self.config.train, self.data.train, self.optimizer
        batch, order = settings.batch_size, plain_order(self.config, data)
        objective = self.runner.objective
        steps = [
            self.open(objective, order.indices(number * batch, batch)) for number in range(count)
        ]
        plan = self.plan(steps, 0)
        steps = steps[: len(plan.rows)]
        tokens = sum(step.waiting_tokens for step in steps)
        self.accumulate(plan, steps, self.active_adapters(0, [adapter] * len(steps)))
        optimizer.step([Step(slot, 0.0, settings) for slot in range(len(steps))])
        return tokens - sum(step.waiting_tokens for step in steps)

    def open(self, objective: Objective, indices: Indices) -> OpenStep:
        """Open an optimizer step over these training examples."""
        data = self.data.train
        widths_n = data.lengths if self.runner.packing else data.longest_parts
        return OpenStep(data, indices, widths_n, objective.over(data, indices, self.runner))

    def plan(self, steps: Sequence[OpenStep], first: int) -> PackedPass:
        """The pass that begins with slot `first`; see `plan_pass`."""
        waiting = [step.waiting_widths for step in steps]
        runner, ranks = self.runner, self.runner.strategy.world_size
        packing, apart = runner.packing, runner.apart
        # Without packing, each sequence of an example has a row, and a planned row stands for all.
        most = runner.micro_tokens // (1 if packing else self.data.train.parts)
        return plan_pass(waiting, first, most, packing, ranks, apart, self.fixed)

    def accumulate(
        self, plan: PackedPass, steps: Sequence[OpenStep], active: ActiveAdapters
    ) -> None:
        """Run a pass: add each slot's gradient and loss to that slot."""
        runner = self.runner
        rank, ranks = runner.strategy.rank, runner.strategy.world_size
        parts = self.data.train.parts
        examples: list[int] = []
        layout: list[Row] = []
        for step, rows in zip(steps, plan.rows, strict=True):
            for row in step.take(rows)[rank::ranks]:
                numbers = range(len(examples) * parts, (len(examples) + len(row)) * parts)
                if runner.packing:
                    layout.append(tuple(numbers))
                else:
                    layout += [tuple(numbers[part : part + 1]) for part in range(parts)]
                examples += row
        batch = runner.collate(self.data.train, np.array(examples, np.int64), tuple(layout))
        sums = accumulate_packed(runner, self.stack, active, batch, steps)
        for step, loss_sum in zip(steps, sums.unbind(), strict=True):
            step.loss_sum = step.loss_sum + loss_sum

    def active_adapters(self, first: int, adapters: Sequence[AdapterInit]) -> ActiveAdapters:
        """The adapters of the slots from `first` on, with their gradients."""
        slots = slice(first, first + len(adapters))
        optimizer = self.optimizer
        return self._over(optimizer.numbers_KN[slots], optimizer.gradients_KN[slots], adapters)

    def scores(self, slots: Sequence[Slot]) -> list[Scores]:
        """Evaluate the runs in these slots in the same passes."""
        numbers_GN = self.optimizer.numbers_KN[[slot.holder.slot for slot in slots]]
        runner = replace(self.runner, objective=together([slot.objective for slot in slots]))
        with self.stack.applied(self._over(numbers_GN, None, [slot.adapter for slot in slots])):
            return evaluate_groups(runner, self.data.validation, len(slots), self._beat)

    def base_scores(self, objective: Objective) -> Scores:
        """Evaluate the base without any adapter."""
        runner = replace(self.runner, objective=objective)
        return evaluate(runner, self.data.validation, self._beat)

    def objective_of(self, config: Config) -> Objective:
        """That of a run: its own, where its losses are of pairs, else the one of all runs."""
        if not OBJECTIVES[config.train.objective].pairs:
            return self.runner.objective
        return build_objective(config, self.data, self.runner.strategy)

    def _over(
        self, numbers_GN: Tensor, gradients_GN: Tensor | None, adapters: Sequence[AdapterInit]
    ) -> ActiveAdapters:
        scales_G = torch.tensor([each.scale for each in adapters], dtype=numbers_GN.dtype)
        return ActiveAdapters(
            self.stack.slices,
            numbers_GN,
            gradients_GN,
            scales_G.to(numbers_GN.device),
            max(each.rank for each in adapters),
            self._dtype,
        )


def accumulate_packed(
    runner: ModelRunner,
    stack: MultiLora,
    active: ActiveAdapters,
    batch: MicroBatch,
    steps: Sequence[OpenStep],
) -> Tensor:
    """Add to each slot the gradient of its own losses over the count of its own step.

    A router loss is divided by the sequences of the slot's step. Returns the sums `[G]` of the
    losses by slot. No value of one slot enters a sum of another, so that NaN in one slot stays
    there. The host does not wait for the device.
    """
    objective, groups = together([step.objective for step in steps]), active.groups
    device, parts = runner.strategy.device, batch.parts
    height, width = len(batch.tokens_BS) // groups, batch.tokens_BS.shape[1]
    slots_Q = [span.row // height for span in batch.spans]
    if parts == 1:
        owners_L = batch.labels_N // (height * width)
    else:  # a loss for each example, and examples are in the order of slots
        owners_L = torch.tensor(slots_Q[::parts], dtype=torch.int64).to(device, non_blocking=True)
    counts = torch.tensor([step.count for step in steps], dtype=torch.float64)
    counts_G = counts.to(device, non_blocking=True)
    shares_Q = [1 / (steps[slot].examples * parts) for slot in slots_Q]
    with stack.applied(active):
        with runner.watched():
            losses_L = objective.losses(runner, batch)
        shares_L = (1 / counts_G).index_select(0, owners_L).to(losses_L.dtype)
        # Not `strategy.backward`: the optimizer sums these gradients over ranks, once a step.
        ((losses_L * shares_L).sum() + runner.balance_loss(batch, shares_Q)).backward()
    sums_G = torch.zeros(groups, dtype=torch.float64, device=device)
    return sums_G.index_add_(0, owners_L, losses_L.detach().double())


class PackedEngine:
    """The slots and the runs in them; the n runs that train are in the slots `0 .. n - 1`.

    Every rank makes the same calls and has the same runs in the same slots. A run that leaves is
    replaced by the one in the last slot. Gradients and losses are summed over ranks once a step.
    """

    def __init__(self, passes: Passes, heart: Heartbeat | None = None) -> None:
        self.passes, self._heart = passes, heart or Heartbeat()
        self._config, self._data = passes.config, passes.data
        self._notes, self._strategy = passes.runner.notes, passes.runner.strategy
        self._channel = self._strategy.side_channel()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._slots: list[Slot] = []
        self._closing: list[Slot] = []
        self._ended: list[Path] = []
        self._next = 0
        self._active: dict[tuple[int, int], ActiveAdapters] = {}
        self._base: list[tuple[Objective, Scores]] = []

    @property
    def free(self) -> int:
        """Slots without a run."""
        return self.passes.slots - len(self._slots)

    def enter(self, spec: RunSpec, reporter: Reporter) -> None:
        """Put a run into a free slot, from its newest sound checkpoint if it has one.

        A run that fails here has ended, and the next `advance` returns it.

        Raises:
            ConfigError: it cannot share this process, or needs a larger rank than slots have.
            ModelError: its targets name no layers of the model.
        """
        assert self.free, "no slot is free"
        adapter = self._draw(spec)
        stack, optimizer = self.passes.stack, self.passes.optimizer
        stack.adapt(list(adapter.layers))
        optimizer.widen(stack.numbers)
        self._active.clear()
        holder = SlotHolder(stack, optimizer, adapter, len(self._slots), self._channel)
        exporter = Exporter(adapter.model, torch.float32)
        objective = self.passes.objective_of(spec.config)
        spec.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            run = build_run_state(
                spec,
                self._data,
                holder,
                holder.names,
                exporter,
                self._strategy,
                reporter,
                self._heart,
                self._pool,
            )
            if run.progress.base is None:
                run.begin(self._base_scores(objective))
        except RunFailed as error:
            if self._strategy.rank == 0:
                end_run(spec, failed_result(spec, error))
            self._ended.append(spec.run_dir)
            return
        slot = Slot(run, adapter, holder, objective, self.passes.open)
        (self._closing if run.over else self._slots).append(slot)

    def leave(self, run_dir: Path, status: Literal["pruned", "interrupted"]) -> None:
        """End a run from outside, with its result; an interrupted one can be resumed.

        A run that came to its own end meanwhile keeps that.
        """
        for slot in self._closing:
            if slot.run.spec.run_dir == run_dir:
                self._close(slot)
                break
        for slot in self._slots:
            if slot.run.spec.run_dir == run_dir:
                with self._failing(slot):
                    if status == "pruned":
                        slot.run.prune()
                    else:
                        slot.run.interrupt(self._notes)
                    self._vacate(slot)
                break
        self._ended = [path for path in self._ended if path != run_dir]

    def advance(self) -> list[Path]:
        """One pass, and the steps, evaluations and checkpoints that it makes due.

        Returns:
            The runs that have ended and left their results.
        """
        if self._slots:
            self._heart.enter(f"pass over {len(self._slots)} runs")
            self._pass()
        settled = self._settled()
        for slot in [slot for slot in self._closing if slot in settled or not self._slots]:
            self._close(slot)
        for slot in [slot for slot in self._slots if slot in settled]:
            with self._failing(slot):
                slot.run.release()
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Wait for what is being written; runs that still train are left as they are."""
        for slot in list(self._closing):
            self._close(slot)
        self._pool.shutdown(wait=True)

    def _draw(self, spec: RunSpec) -> AdapterInit:
        ours, theirs = self._config, spec.config
        method, largest = theirs.method, self.passes.stack.rank
        reason = packable(theirs)
        if theirs.model != ours.model or theirs.train.precision != ours.train.precision:
            reason = "its model or precision is not the one loaded here"
        elif spec.data_dir != self._data.path:
            reason = "its data are not those loaded here"
        elif isinstance(method, LoraMethod) and method.rank > largest:
            reason = f"method.rank={method.rank} is above {largest}, which slots have"
        if reason is not None or not isinstance(method, LoraMethod):
            raise ConfigError(
                f"run {theirs.name}",
                f"cannot be packed: {reason}",
                "write search.execution: isolated",
            )
        return init_adapter(self.passes.shapes, method, theirs.train.precision, theirs.seed)

    def _base_scores(self, objective: Objective) -> Scores:
        """The base's own scores, which are the same for every run with this objective."""
        for known, scores in self._base:
            if known == objective:
                return scores
        self._base.append((objective, self.passes.base_scores(objective)))
        return self._base[-1][1]

    def _settled(self) -> set[Slot]:
        """Slots without a checkpoint being written on any rank: waiting for it takes no time."""
        slots = [*self._closing, *self._slots]
        pending = [slot for slot in slots if slot.run.saver.pending]
        if not pending:
            return set(slots)
        writing = torch.tensor([float(slot.run.saver.busy) for slot in pending])
        counts = self._strategy.sum(writing.to(self._strategy.device)).tolist()
        return set(slots) - {slot for slot, count in zip(pending, counts, strict=True) if count}

    def _pass(self) -> None:
        first = self._next if self._next < len(self._slots) else 0
        plan = self.passes.plan([slot.open for slot in self._slots], first)
        self._next = first + len(plan.rows)
        slots = self._slots[first : self._next]
        self.passes.accumulate(
            plan, [slot.open for slot in slots], self._active_adapters(first, slots)
        )
        done = [slot for slot in slots if not slot.open.waiting_widths]
        if done:
            self._step(done)

    def _step(self, done: Sequence[Slot]) -> None:
        norms = self.passes.optimizer.step([slot.optimizer_step() for slot in done])
        shares = torch.stack([torch.as_tensor(slot.open.loss_sum) for slot in done])
        loss_sums = self._strategy.sum(shares).tolist()
        going, due = [], []
        for slot, norm, loss_sum in zip(done, norms, loss_sums, strict=True):
            with self._failing(slot):
                is_due = slot.run.after_step(slot.open.work, loss_sum / slot.open.count, norm)
                going.append(slot)
                due += [slot] if is_due else []
        scores = dict(zip(due, self._evaluate(due), strict=True))
        for slot in going:
            with self._failing(slot):
                slot.run.after_evaluation(scores.get(slot))
                if slot.run.over:
                    self._vacate(slot)
                    self._closing.append(slot)
                else:
                    slot.begin_step()

    def _evaluate(self, slots: Sequence[Slot]) -> list[Scores]:
        if not slots:
            return []
        names = ", ".join(slot.run.spec.run_dir.name for slot in slots)
        self._heart.enter(f"evaluation of {names}")
        return self.passes.scores(slots)

    def _active_adapters(self, first: int, slots: Sequence[Slot]) -> ActiveAdapters:
        """Cached as long as the same runs are in the same slots."""
        key = first, len(slots)
        if key not in self._active:
            self._active[key] = self.passes.active_adapters(first, [slot.adapter for slot in slots])
        return self._active[key]

    @contextmanager
    def _failing(self, slot: Slot) -> Iterator[None]:
        """A failure inside the context ends this run; the other runs go on."""
        try:
            yield
        except RunFailed as error:
            slot.run.fail(error)
            self._vacate(slot)
            self._ended.append(slot.run.spec.run_dir)

    def _vacate(self, slot: Slot) -> None:
        """The run in the last slot moves here, so that the slots in use stay contiguous."""
        last = self._slots.pop()
        if last is not slot:
            number = slot.holder.slot
            self.passes.optimizer.move(last.holder.slot, number)
            last.holder.slot, self._slots[number] = number, last
        self._active.clear()

    def _close(self, slot: Slot) -> None:
        self._closing.remove(slot)
        try:
            slot.run.finish(self._notes)
        except RunFailed as error:
            slot.run.fail(error)
        self._ended.append(slot.run.spec.run_dir)
