"""Many LoRA runs at once against one frozen base, in one process or on several ranks.

Each of them is the run that it would be alone, with its own seed, schedule, batch and end; only
the passes through the model are shared. When one ends, the next enters its slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from raytune_ft.config.execution import packable
from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.schema import Config
from raytune_ft.data.batch import MicroBatch, Row
from raytune_ft.data.order import Indices
from raytune_ft.data.prepare import PreparedData
from raytune_ft.errors import ConfigError, InputError, RunFailed
from raytune_ft.model.loss import label_positions
from raytune_ft.model.meta import build_base, shapes_of
from raytune_ft.packed.autotune import (
    fewest_near_best,
    seconds_a_token,
    slots_in,
    told,
    worth_trying,
)
from raytune_ft.packed.layout import PackedPass, plan_pass
from raytune_ft.packed.lora import Drawn, MultiLora, Window, draw_adapter
from raytune_ft.packed.optim import PackedAdamW, Step
from raytune_ft.packed.slot import OpenStep, SlotHolder, SlotRun
from raytune_ft.strategy import Strategy
from raytune_ft.train.engine import Engine
from raytune_ft.train.evaluation import Scores, evaluate, evaluate_groups
from raytune_ft.train.report import Reporter
from raytune_ft.train.result import write_ended
from raytune_ft.train.setup import build_engine, build_objective, check_vocabulary, plain_order
from raytune_ft.train.spec import RunSpec
from raytune_ft.train.watchdog import Beat, Heartbeat


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


def accumulate_packed(
    engine: Engine,
    stack: MultiLora,
    window: Window,
    batch: MicroBatch,
    step_counts: Sequence[float],
) -> list[float]:
    """Add to each slot's gradient that of its own token losses over the count of its own step.

    Returns the sums of the losses by slot. No sum over slots reaches any of them, so that NaN in
    one stays there.
    """
    groups, device = window.groups, engine.strategy.device
    counts_G = label_positions(batch).view(groups, -1).sum(1)
    owners_N = torch.arange(groups, device=device).repeat_interleave(counts_G)
    shares_G = 1 / torch.tensor(step_counts, dtype=torch.float64, device=device)
    with stack.applied(window):
        losses_N = engine.training_losses(batch)
        shares_N = shares_G[owners_N].to(losses_N.dtype)
        # Not the strategy's: the optimizer sums these gradients over ranks, once a step.
        (losses_N * shares_N).sum().backward()
    sums_G = torch.zeros(groups, dtype=torch.float64, device=device)
    sums_G.index_add_(0, owners_N, losses_N.detach().double())
    found: list[float] = sums_G.tolist()
    return found


Left = Literal["pruned", "interrupted"]


class PackedEngine:
    """Slots `0 .. n - 1` are those of the n runs that train; who leaves is replaced by the last.

    Every rank makes the same calls and has the same runs in the same slots. Gradients and losses
    are summed over ranks once a step.

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
        heart: Heartbeat | None = None,
    ) -> None:
        """`config` says what all runs share: the model, its precision, the layout of passes."""
        self._config, self._data = config, data
        self._heart = heart or Heartbeat()
        self.passes = Passes(config, data, slots, largest_rank, strategy, self._heart.beat)
        self._notes, self._strategy = self.passes.engine.notes, strategy
        self._line = strategy.exchange()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._runs: list[SlotRun] = []
        self._closing: list[SlotRun] = []
        self._ended: list[Path] = []
        self._next = 0
        self._windows: dict[tuple[int, int], Window] = {}

    @property
    def free(self) -> int:
        """Slots that nobody trains in."""
        return self.passes.slots - len(self._runs)

    def enter(self, spec: RunSpec, reporter: Reporter) -> None:
        """Take a free slot, and go on from the run's newest sound checkpoint if it has one.

        A run that fails here has ended, and the next `advance` says so.

        Raises:
            ConfigError: it cannot share this process, or asks for more than the slot has.
            ModelError: its targets name no layers of the model.
        """
        assert self.free, "no slot is free"
        drawn = self._draw(spec)
        stack, optimizer = self.passes.stack, self.passes.optimizer
        stack.adapt(list(drawn.layers))
        optimizer.widen(stack.numbers)
        self._windows.clear()
        holder = SlotHolder(stack, optimizer, drawn, len(self._runs), self._line)
        spec.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            run = SlotRun(
                spec,
                self._data,
                self.passes.open,
                drawn,
                holder,
                self._strategy,
                reporter,
                self._heart,
                self._pool,
            )
            run.begin(self._base)
        except RunFailed as error:
            if self._strategy.rank == 0:
                write_ended(spec, "failed", f"{type(error).__name__}: {error}")
            self._ended.append(spec.run_dir)
            return
        (self._closing if run.over else self._runs).append(run)

    def leave(self, run_dir: Path, status: Left) -> None:
        """Drop a run and leave its result; an interrupted one can be resumed.

        A run that came to its own end meanwhile keeps that, and nobody hears of it again.
        """
        for run in self._closing:
            if run.spec.run_dir == run_dir:
                self._close(run)
                break
        for run in self._runs:
            if run.spec.run_dir == run_dir:
                with self._failing(run):
                    run.leave(status, self._notes)
                    self._vacate(run)
                break
        self._ended = [path for path in self._ended if path != run_dir]

    def advance(self) -> list[Path]:
        """One pass, and the steps, evaluations and checkpoints that it makes due.

        Returns:
            The runs that have ended and left their results.
        """
        if self._runs:
            self._pass()
        settled = self._settled()
        for run in [run for run in self._closing if run in settled or not self._runs]:
            self._close(run)
        for run in [run for run in self._runs if run in settled]:
            with self._failing(run):
                run.pass_on()
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Wait for what is being written; runs that still train are left as they are."""
        for run in list(self._closing):
            self._close(run)
        self._pool.shutdown(wait=True)

    def _draw(self, spec: RunSpec) -> Drawn:
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
        return draw_adapter(self.passes.shapes, method, theirs.train.precision, theirs.seed)

    @cached_property
    def _base(self) -> Scores:
        """The base's own scores, which are the same for every run."""
        return self.passes.base_scores()

    def _settled(self) -> set[SlotRun]:
        """Runs with no checkpoint on its way on any rank, so that to wait for it takes no time."""
        runs = [*self._closing, *self._runs]
        pending = [run for run in runs if run.pending]
        if not pending:
            return set(runs)
        writing = torch.tensor([float(run.writing) for run in pending])
        counts = self._strategy.sum(writing.to(self._strategy.device)).tolist()
        return set(runs) - {run for run, count in zip(pending, counts, strict=True) if count}

    def _pass(self) -> None:
        first = self._next if self._next < len(self._runs) else 0
        plan = self.passes.plan([run.open for run in self._runs], first)
        self._next = first + len(plan.rows)
        runs = self._runs[first : self._next]
        self.passes.accumulate(plan, [run.open for run in runs], self._window(first, runs))
        done = [run for run in runs if not run.open.waiting_lengths]
        if done:
            self._step(done)

    def _step(self, done: Sequence[SlotRun]) -> None:
        steps = [run.next_step() for run in done]
        norms = self.passes.optimizer.step(steps)
        shares = torch.tensor([run.open.loss_sum for run in done], dtype=torch.float64)
        loss_sums = self._strategy.sum(shares.to(self._strategy.device)).tolist()
        going, due = [], []
        for run, step, norm, loss_sum in zip(done, steps, norms, loss_sums, strict=True):
            with self._failing(run):
                is_due = run.after_step(loss_sum, step.lr, norm)
                going.append(run)
                due += [run] if is_due else []
        scores = dict(zip(due, self._evaluate(due), strict=True))
        for run in going:
            with self._failing(run):
                run.settle(scores.get(run))
                if run.over:
                    self._vacate(run)
                    self._closing.append(run)

    def _evaluate(self, runs: Sequence[SlotRun]) -> list[Scores]:
        if not runs:
            return []
        return self.passes.scores([run.holder.slot for run in runs], [run.drawn for run in runs])

    def _window(self, first: int, runs: Sequence[SlotRun]) -> Window:
        """Kept for as long as the same runs are in the same slots."""
        key = first, len(runs)
        if key not in self._windows:
            self._windows[key] = self.passes.window(first, [run.drawn for run in runs])
        return self._windows[key]

    @contextmanager
    def _failing(self, run: SlotRun) -> Iterator[None]:
        """Inside, a failure is this run's and ends it; the others hear nothing of it."""
        try:
            yield
        except RunFailed as error:
            run.fail(error)
            self._vacate(run)
            self._ended.append(run.spec.run_dir)

    def _vacate(self, run: SlotRun) -> None:
        """The last run moves where this one was, so that slots in use follow one another."""
        last = self._runs.pop()
        if last is not run:
            slot = run.holder.slot
            self.passes.optimizer.move(last.holder.slot, slot)
            last.holder.slot, self._runs[slot] = slot, last
        self._windows.clear()

    def _close(self, run: SlotRun) -> None:
        self._closing.remove(run)
        try:
            run.finish(self._notes)
        except RunFailed as error:
            run.fail(error)
        self._ended.append(run.spec.run_dir)
