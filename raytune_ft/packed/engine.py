"""Many LoRA runs at once against one frozen base, in one process or on several ranks.

Each run is what it would be alone: the same `RunState` decides its order, schedule, end and
checkpoints. What differs from `train.loop`:

1. A step is spread over passes: a pass takes examples of several slots' open steps in one forward.
2. The adapters of all slots are stacked tensors (`lora`), with one AdamW over their rows (`optim`).
3. One pass makes several evaluations due, which one pass over the validation set answers.
4. A run enters a free slot and leaves it at its end, or when it fails; the others go on.
5. The base's own scores are computed once, for all runs.
6. Runs that ask their models wait for each other, and their models answer in the same passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from raytune_ft.config.execution import packable
from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.schema import Config
from raytune_ft.data.batch import FREELY, MicroBatch, Row
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.prompts import prompts_of
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError, InputError, RunFailed
from raytune_ft.model.meta import build_base, shapes_of
from raytune_ft.model.objectives import Objective
from raytune_ft.model.sampling import Requests, Said, requests_of
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
from raytune_ft.train.material import Material, Work
from raytune_ft.train.model_runner import ModelRunner, choose_micro_tokens
from raytune_ft.train.report import Reporter
from raytune_ft.train.result import end_run, failed_result
from raytune_ft.train.setup import (
    build_objective,
    build_run_state,
    build_runner,
    extent_of,
    material_of,
    plain_order,
)
from raytune_ft.train.speaker import Answered, Turn, Voice, said_together
from raytune_ft.train.watchdog import Beat, Heartbeat, no_beat

T = TypeVar("T")
TRIED_TOKENS = 8
"""Of each answer, where the number of slots is chosen by the time of sampling."""


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
        voice: Voice | None = None,
    ) -> None:
        """`config` has what all runs share: the model, its precision, the layout of passes. `voice`
        answers where runs ask their models.
        """
        self.config, self.data, self.voice, self._beat = config, data, voice, beat
        self.slots, self.fixed = slots, PASS_TOKENS
        built = build_base(config.model, config.train.precision, strategy.takes_parts)
        base = built.model
        self.shapes = shapes_of(base)
        self.optimizer = PackedAdamW(slots, strategy)
        objective = build_objective(config, data, strategy)
        room = choose_micro_tokens(config.train.micro_tokens, strategy.device)
        extent, longest = extent_of(config, data)
        widest = max(room, longest)
        runner = build_runner(built, config, strategy, _no_optimizer, objective, extent, widest)
        self.parts = max(data.train.parts, OBJECTIVES[config.train.objective].rollouts)
        self.measures = not OBJECTIVES[config.train.objective].rollouts
        if self.parts > 1 and runner.apart != FREELY:
            # A row of several pairs does not show the lengths that are kept apart.
            runner = replace(runner, packing=False)
        self._dtype = getattr(torch, config.train.precision)
        # Selective checkpointing keeps results of products, so they must not change in place.
        in_place = config.parallel.activation_checkpointing != "selective"
        self.stack = MultiLora(base, largest_rank, in_place)
        self._drawn: deque[tuple[LoraMethod, int, AdapterInit]] = deque(maxlen=slots)
        self.runner = replace(runner, without_method=self.stack.bare)

    def settle(self, memory: int | None, measured: bool) -> str:
        """Choose the number of slots, before the first run; returns the choice and its reason.

        At most as many as `memory` bytes hold (None: unknown, no limit). If `measured`, the fewest
        with which a token costs about the least time, in sampling where runs roll out; what a pass
        costs beside its tokens is found from the same passes, and decides which rows share one. The
        engine's config stands for the runs'.
        """
        config, strategy, optimizer = self.config, self.runner.strategy, self.optimizer
        assert isinstance(config.method, LoraMethod)
        try:
            adapter = self.draw(config.method, config.seed)
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
            step_tokens = round(self.data.train.lengths.mean() * config.train.batch_size)
            if not self.measures:  # of each answer a pass of sampling has one token
                step_tokens = config.train.batch_size * config.train.rollout.num_generations
            pass_tokens = self.runner.micro_tokens * strategy.world_size
            counts = worth_trying(self.slots, step_tokens, pass_tokens)
            if len(counts) > 1:
                why = self._measure(adapter, counts)
            else:
                self.slots, why = 1, "the step of one trial fills a pass"
            optimizer.keep(self.slots)
        self._drawn = deque(self._drawn, maxlen=self.slots)
        return f"{self.slots} slot{'s' * (self.slots != 1)} ({why})"

    def _measure(self, adapter: AdapterInit, counts: Sequence[int]) -> str:
        """Choose among `counts` slots by their time; returns the reason."""
        strategy = self.runner.strategy
        self.optimizer.widen(self.stack.numbers)
        tokens: dict[int, int] = {}
        attempt = self._try if self.measures else self._try_sampling

        def one_pass(count: int) -> int:
            tokens[count] = attempt(adapter, count)
            return tokens[count]

        seconds = seconds_a_token(one_pass, counts, strategy.from_rank0)
        if seconds is None:
            return "as planned: the machine is too busy to measure whether fewer are as fast"
        self.slots, why = fewest_near_best(seconds), describe(seconds)
        ranks, most = strategy.world_size, self.runner.micro_tokens
        passes = {tokens[count] / ranks: tokens[count] * s for count, s in seconds.items()}
        found = fixed_tokens(passes, most) if self.measures else None
        if found is not None:
            self.fixed, why = found, f"{why}; a pass costs {found:,} more"
        return why

    def _fit_everywhere(self, here: int) -> int:
        """The number of slots that fits on every rank; shards and hosts differ in size."""
        strategy = self.runner.strategy
        fit_K = [float(count <= here) for count in range(1, self.slots + 1)]
        ranks_K = strategy.sum(torch.tensor(fit_K, device=strategy.device))
        return max(1, int((ranks_K == strategy.world_size).sum()))

    def _try(self, adapter: AdapterInit, count: int) -> int:
        """Run a pass with `count` slots and its optimizer step; the number of its tokens."""
        settings, optimizer = self.config.train, self.optimizer
        data, batch = self.data.train, settings.batch_size
        order = plain_order(self.config, data)
        steps = [
            self.open(
                self.runner.objective, Work.of(data, order.indices(number * batch, batch), ())
            )
            for number in range(count)
        ]
        plan = self.plan(steps)
        steps = steps[: len(plan.rows)]
        tokens = sum(step.waiting_tokens for step in steps)
        self.accumulate(plan, steps, self.active_adapters(0, [adapter] * len(steps)))
        optimizer.step([Step(slot, 0.0, settings) for slot in range(len(steps))])
        return tokens - sum(step.waiting_tokens for step in steps)

    def _try_sampling(self, adapter: AdapterInit, count: int) -> int:
        """Sample `TRIED_TOKENS` tokens of every answer of a step of `count` slots, as `_try`."""
        assert self.voice is not None
        train, strategy = self.config.train, self.runner.strategy
        prompts, order = prompts_of(self.data, "train"), plain_order(self.config, self.data.train)
        asked = []
        for number in range(count):
            indices = order.indices(number * train.batch_size, train.batch_size)
            placed = [(place, prompts[int(index)]) for place, index in enumerate(indices)]
            own = placed[strategy.rank :: strategy.world_size]
            requests = requests_of(own, train.rollout.num_generations)
            asked.append(Requests(requests, TRIED_TOKENS))
        with self.stack.applied(self.active_adapters(0, [adapter] * count)):
            said_together(self.runner, asked, replace(self.voice, ends=()), lambda: None)
        return count * train.batch_size * train.rollout.num_generations * TRIED_TOKENS

    def draw(self, method: LoraMethod, seed: int) -> AdapterInit:
        """The adapter of a run before its first step; one of the last few is used again.

        Raises:
            ModelError, ConfigError: see `init_adapter`.
        """
        for known, its_seed, adapter in self._drawn:
            if (known, its_seed) == (method, seed):
                return adapter
        adapter = init_adapter(self.shapes, method, self.config.train.precision, seed)
        self._drawn.append((method, seed, adapter))
        return adapter

    def open(self, objective: Objective, work: Work) -> OpenStep:
        """Open an optimizer step."""
        split = work.split
        widths_m = self.runner.widths(split, work.indices)
        return OpenStep(work, widths_m, objective.over(split, work.indices, self.runner))

    def plan(self, steps: Sequence[OpenStep]) -> PackedPass:
        """The pass that begins with the first of these slots; see `plan_pass`."""
        waiting = [step.waiting_widths for step in steps]
        runner, ranks = self.runner, self.runner.strategy.world_size
        packing, apart = runner.packing, runner.apart
        # Without packing, each sequence of an example has a row, and a planned row stands for all.
        most = runner.micro_tokens // (1 if packing else self.parts)
        return plan_pass(waiting, most, packing, ranks, apart, self.fixed)

    def accumulate(
        self, plan: PackedPass, steps: Sequence[OpenStep], active: ActiveAdapters
    ) -> None:
        """Run a pass: add each slot's gradient and loss to that slot."""
        runner = self.runner
        rank, ranks = runner.strategy.rank, runner.strategy.world_size
        parts = self.parts
        split, begins = _joined([step.work.split for step in steps])
        examples: list[int] = []
        layout: list[Row] = []
        for step, begin, rows in zip(steps, begins, plan.rows, strict=True):
            for row in step.take(rows)[rank::ranks]:
                numbers = range(len(examples) * parts, (len(examples) + len(row)) * parts)
                if runner.packing:
                    layout.append(tuple(numbers))
                else:
                    layout += [tuple(numbers[part : part + 1]) for part in range(parts)]
                examples += [begin + index for index in row]
        batch = runner.collate(split, np.array(examples, np.int64), tuple(layout))
        sums = accumulate_packed(runner, self.stack, active, batch, steps)
        for step, loss_sum in zip(steps, sums.unbind(), strict=True):
            step.loss_sum = step.loss_sum + loss_sum

    def active_adapters(self, first: int, adapters: Sequence[AdapterInit]) -> ActiveAdapters:
        """The adapters of the slots from `first` on, with their gradients."""
        slots = slice(first, first + len(adapters))
        optimizer = self.optimizer
        return self._over(optimizer.numbers_KN[slots], optimizer.gradients_KN[slots], adapters)

    def measured(self, slots: Sequence[Slot]) -> list[Scores]:
        """Evaluate the runs in these slots on the validation split, in the same passes."""
        runner = replace(self.runner, objective=together([slot.objective for slot in slots]))
        with self.applied(slots):
            return evaluate_groups(runner, self.data.validation, len(slots), self._beat)

    def base_measured(self, objective: Objective) -> Scores:
        """Evaluate the base without any adapter."""
        runner = replace(self.runner, objective=objective)
        return evaluate(runner, self.data.validation, self._beat)

    def applied(self, slots: Sequence[Slot]) -> AbstractContextManager[None]:
        """A context without gradients in which the model computes equally many rows for each of
        these slots.
        """
        numbers_GN = self.optimizer.numbers_KN[[slot.holder.slot for slot in slots]]
        return self.stack.applied(self._over(numbers_GN, None, [slot.adapter for slot in slots]))

    def objective_of(self, config: Config) -> Objective:
        """That of a run: its own, where each trial has keys of its own, else the one of all."""
        facts = OBJECTIVES[config.train.objective]
        if not facts.of_answers:
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


def _joined(splits: Sequence[TokenizedSplit]) -> tuple[TokenizedSplit, list[int]]:
    """The examples of all these splits, and where those of each begin. Runs share the split of the
    data, and have rollouts of their own.
    """
    different = list(dict.fromkeys(splits))
    if len(different) == 1:
        return different[0], [0] * len(splits)
    ends = np.cumsum([len(split) for split in different]).tolist()
    begins = dict(zip(different, [0, *ends], strict=False))
    return TokenizedSplit.joined(different), [begins[split] for split in splits]


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
        self._base: list[tuple[object, Any]] = []

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
        objective = self.passes.objective_of(spec.config)
        runner, voice = self.passes.runner, self.passes.voice
        material = material_of(runner, self._data, spec, self._heart, voice)
        spec.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            run = build_run_state(
                spec,
                self._data,
                holder,
                holder.names,
                adapter.exporter,
                self._strategy,
                reporter,
                self._heart,
                self._pool,
                material,
            )
            if run.progress.base is None:
                run.begin(self._base_scores(spec, objective, material))
        except RunFailed as error:
            if self._strategy.rank == 0:
                end_run(spec, failed_result(spec, error))
            self._ended.append(spec.run_dir)
            return
        slot = Slot(run, adapter, holder, objective, material, self.passes.open)
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
        """One pass, and the steps, evaluations and checkpoints that it makes due. Before it the
        runs ask their models, together, once all of them wait for answers.

        Returns:
            The runs that have ended and left their results.
        """
        if self._slots and all(slot.open is None for slot in self._slots):
            self._heart.enter(f"rollouts of {len(self._slots)} runs")
            self._ask({slot: slot.turn for slot in self._slots if slot.turn}, Slot.hear)
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
        return self.passes.draw(method, theirs.seed)

    def _base_scores(self, spec: RunSpec, objective: Objective, material: Material) -> Scores:
        """The base's own scores. What it measures is the same for every run with this objective,
        and what it answers for every run with these settings and this seed.
        """
        measured = answered = None
        if self.passes.measures:
            measured = self._once(objective, partial(self.passes.base_measured, objective))
        with self.passes.stack.bare():
            if (turn := material.evaluation()) is not None:
                answers = spec.config.train.rollout, spec.config.seed
                answered = self._once(answers, partial(self._answer, turn))
            return material.scores(measured, answered)

    def _answer(self, turn: Turn) -> Answered:
        return turn.speaker.scored(turn, self._said([turn])[0])

    def _once(self, key: object, make: Callable[[], T]) -> T:
        """What is made of the base; the next run with an equal key gets the same."""
        found: T
        for known, found in self._base:
            if known == key:
                return found
        found = make()
        self._base.append((key, found))
        return found

    def _settled(self) -> set[Slot]:
        """Slots without a checkpoint being written on any rank: waiting for it takes no time."""
        slots = [*self._closing, *self._slots]
        pending = [slot for slot in slots if slot.run.saver.pending]
        if not pending:
            return set(slots)
        writing = torch.tensor([float(slot.run.saver.busy) for slot in pending])
        counts = self._strategy.sum(writing.to(self._strategy.device)).tolist()
        return set(slots) - {slot for slot, count in zip(pending, counts, strict=True) if count}

    def _ask(self, turns: Mapping[Slot, Turn], hear: Callable[[Slot, Answered], None]) -> None:
        """Have the models of these runs answer in the same passes, and each run hear its answers,
        with its adapter applied. A run whose answers have no scores fails alone.
        """
        with self.passes.applied(list(turns)):
            said = self._said(list(turns.values()))
        for (slot, turn), own in zip(turns.items(), said, strict=True):
            with self._failing(slot), self.passes.applied([slot]):
                hear(slot, turn.speaker.scored(turn, own))

    def _said(self, turns: Sequence[Turn]) -> list[list[Said]]:
        voice = self.passes.voice
        assert voice is not None
        asked = [turn.speaker.requests(turn) for turn in turns]
        return said_together(self.passes.runner, asked, voice, self._heart.alive)

    def _pass(self) -> None:
        first, steps = self._open_steps()
        plan = self.passes.plan(steps)
        self._next = first + len(plan.rows)
        slots, steps = self._slots[first : self._next], steps[: len(plan.rows)]
        self.passes.accumulate(plan, steps, self._active_adapters(first, slots))
        done = [
            (slot, step) for slot, step in zip(slots, steps, strict=True) if not step.waiting_widths
        ]
        if done:
            self._step(done)

    def _open_steps(self) -> tuple[int, list[OpenStep]]:
        """The slot whose turn it is, of those with an open step, and the open steps from there up
        to a slot without one.
        """
        count = len(self._slots)
        places = [*range(self._next, count), *range(count)]
        first = next(place for place in places if self._slots[place].open is not None)
        steps = takewhile(lambda step: step is not None, (s.open for s in self._slots[first:]))
        return first, [step for step in steps if step is not None]

    def _step(self, done: Sequence[tuple[Slot, OpenStep]]) -> None:
        norms = self.passes.optimizer.step([slot.optimizer_step() for slot, _ in done])
        shares = torch.stack([torch.as_tensor(step.loss_sum) for _, step in done])
        loss_sums = self._strategy.sum(shares).tolist()
        going, due = [], []
        for (slot, step), norm, loss_sum in zip(done, norms, loss_sums, strict=True):
            with self._failing(slot):
                is_due = slot.run.after_step(step.work, loss_sum / step.count, norm)
                going.append(slot)
                due += [slot] if is_due else []
        scores = self._evaluate(due)
        for slot in going:
            if slot in due and slot not in scores:
                continue  # its evaluation has failed, and so the run
            with self._failing(slot):
                slot.run.after_evaluation(scores.get(slot))
                if slot.run.over:
                    self._vacate(slot)
                    self._closing.append(slot)
                else:
                    slot.begin_step()

    def _evaluate(self, slots: Sequence[Slot]) -> dict[Slot, Scores]:
        """The scores of runs, without those that fail in it."""
        if not slots:
            return {}
        names = ", ".join(slot.run.spec.run_dir.name for slot in slots)
        self._heart.enter(f"evaluation of {names}")
        measured: dict[Slot, Scores] = {}
        if self.passes.measures:
            measured = dict(zip(slots, self.passes.measured(slots), strict=True))
        turns: dict[Slot, Turn] = {}
        scores: dict[Slot, Scores] = {}
        for slot in slots:
            with self._failing(slot):
                if (turn := slot.material.evaluation()) is None:
                    scores[slot] = slot.material.scores(measured[slot], None)
                else:
                    turns[slot] = turn

        def hear(slot: Slot, answered: Answered) -> None:
            scores[slot] = slot.material.scores(measured.get(slot), answered)

        if turns:
            self._ask(turns, hear)
        return scores

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
