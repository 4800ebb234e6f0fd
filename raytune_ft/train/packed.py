"""Many LoRA runs at once against one frozen base, in one process or on several ranks.

Each of them is the run that it would be alone, with its own seed, schedule, batch and end; only
the passes through the model are shared. When one ends, the next enters its slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from raytune_ft.config.packable import packable
from raytune_ft.config.schema import Config, LoraMethod
from raytune_ft.data.layout import Row
from raytune_ft.data.prepare import PreparedData
from raytune_ft.errors import ConfigError, RunFailed
from raytune_ft.model.drawn import Drawn, draw_adapter
from raytune_ft.model.multi_lora import MultiLora, Window
from raytune_ft.model.skeleton import build_base, shapes_of
from raytune_ft.strategy import Strategy
from raytune_ft.train.ended import write_ended
from raytune_ft.train.evaluation import Scores, evaluate, evaluate_groups
from raytune_ft.train.heartbeat import Heartbeat
from raytune_ft.train.packed_holder import SlotHolder
from raytune_ft.train.packed_layout import PackedPass, plan_pass
from raytune_ft.train.packed_optim import PackedAdamW
from raytune_ft.train.packed_slot import SlotRun
from raytune_ft.train.packed_step import accumulate_packed
from raytune_ft.train.report import Reporter
from raytune_ft.train.setup import build_engine, check_vocabulary
from raytune_ft.train.spec import RunSpec

Left = Literal["pruned", "interrupted"]


def _of_nothing(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The base is frozen, and the slots have an optimizer of their own."""
    return torch.optim.SGD([{"params": list(parameters)}])


class PackedEngine:
    """Slots `0 .. n - 1` are those of the n runs that train; who leaves is replaced by the last.

    Every rank makes the same calls and has the same runs in the same slots. Adapters and moments
    are whole on each of them; the rows of a pass are shared out, and gradients summed once a step.

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
        self._config, self._data, self._slots = config, data, slots
        self._heart = heart or Heartbeat()
        built = build_base(config.model, config.train.precision, strategy.takes_parts)
        base = built.model
        check_vocabulary(base, data)
        self._shapes = shapes_of(base)
        self._optimizer = PackedAdamW(slots, strategy)
        self._engine = build_engine(built, config, strategy, _of_nothing)
        self._line = strategy.exchange()
        self._dtype = getattr(torch, config.train.precision)
        # Selective checkpointing keeps results of products, which must then stay as they are.
        in_place = config.parallel.activation_checkpointing != "selective"
        self._stack = MultiLora(base, largest_rank, in_place)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._runs: list[SlotRun] = []
        self._closing: list[SlotRun] = []
        self._ended: list[Path] = []
        self._next = 0
        self._windows: dict[tuple[int, int], Window] = {}

    @property
    def free(self) -> int:
        """Slots that nobody trains in."""
        return self._slots - len(self._runs)

    def enter(self, spec: RunSpec, reporter: Reporter) -> None:
        """Take a free slot, and go on from the run's newest sound checkpoint if it has one.

        A run that fails here has ended, and the next `advance` says so.

        Raises:
            ConfigError: it cannot share this process, or asks for more than the slot has.
            ModelError: its targets name no layers of the model.
        """
        assert self.free, "no slot is free"
        drawn = self._draw(spec)
        self._stack.adapt(list(drawn.layers))
        self._optimizer.widen(self._stack.numbers)
        self._windows.clear()
        holder = SlotHolder(self._stack, self._optimizer, drawn, len(self._runs), self._line)
        spec.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            run = SlotRun(
                spec,
                self._data.train,
                drawn,
                holder,
                self._engine.strategy,
                reporter,
                self._heart,
                self._pool,
            )
            run.begin(self._base)
        except RunFailed as error:
            if self._engine.strategy.rank == 0:
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
                    run.leave(status, self._engine.notes)
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
        method = theirs.method
        reason = packable(theirs)
        if theirs.model != ours.model or theirs.train.precision != ours.train.precision:
            reason = "its model or precision is not the one loaded here"
        elif spec.data_dir != self._data.path:
            reason = "its data are not those loaded here"
        elif isinstance(method, LoraMethod) and method.rank > self._stack.rank:
            reason = f"method.rank={method.rank} is above {self._stack.rank}, which slots have"
        if reason is not None or not isinstance(method, LoraMethod):
            raise ConfigError(
                f"run {theirs.name}",
                f"cannot be packed: {reason}",
                "write search.execution: isolated",
            )
        return draw_adapter(self._shapes, method, theirs.train.precision, theirs.seed)

    @cached_property
    def _base(self) -> Scores:
        """The base's own scores, which are the same for every run."""
        return evaluate(self._engine, self._data.validation, self._heart.beat)

    def _settled(self) -> set[SlotRun]:
        """Runs with no checkpoint on its way on any rank, so that to wait for it takes no time."""
        runs = [*self._closing, *self._runs]
        pending = [run for run in runs if run.pending]
        if not pending:
            return set(runs)
        strategy = self._engine.strategy
        writing = torch.tensor([float(run.writing) for run in pending], device=strategy.device)
        counts = strategy.sum(writing).tolist()
        return set(runs) - {run for run, count in zip(pending, counts, strict=True) if count}

    def _pass(self) -> None:
        waiting = [run.waiting_lengths for run in self._runs]
        first = self._next if self._next < len(waiting) else 0
        engine = self._engine
        ranks = engine.strategy.world_size
        plan = plan_pass(waiting, first, engine.micro_tokens, engine.packing, ranks)
        self._next = first + len(plan.rows)
        runs = self._runs[first : self._next]
        self._accumulate(plan, runs)
        done = [run for run in runs if not run.waiting_lengths]
        if done:
            self._step(done)

    def _accumulate(self, plan: PackedPass, runs: Sequence[SlotRun]) -> None:
        engine = self._engine
        rank, ranks = engine.strategy.rank, engine.strategy.world_size
        examples: list[int] = []
        layout: list[Row] = []
        for run, rows in zip(runs, plan.rows, strict=True):
            for row in run.take(rows)[rank::ranks]:
                layout.append(tuple(range(len(examples), len(examples) + len(row))))
                examples += row
        batch = engine.collate(self._data.train, np.array(examples), tuple(layout))
        label_tokens = [run.label_tokens for run in runs]
        window = self._window(plan.first, runs)
        sums = accumulate_packed(engine, self._stack, window, batch, label_tokens)
        for run, loss_sum in zip(runs, sums, strict=True):
            run.add_loss(loss_sum)

    def _step(self, done: Sequence[SlotRun]) -> None:
        steps = [run.next_step() for run in done]
        norms = self._optimizer.step(steps)
        strategy = self._engine.strategy
        shares = torch.tensor([run.loss_sum for run in done], dtype=torch.float64)
        loss_sums = strategy.sum(shares.to(strategy.device)).tolist()
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
        """Of several runs, together."""
        if not runs:
            return []
        numbers_KN = self._optimizer.numbers_KN
        numbers_GN = numbers_KN[[run.holder.slot for run in runs]]
        with self._stack.applied(self._window_over(numbers_GN, None, runs)):
            return evaluate_groups(self._engine, self._data.validation, len(runs), self._heart.beat)

    def _window(self, first: int, runs: Sequence[SlotRun]) -> Window:
        key = first, len(runs)
        if key not in self._windows:
            slots = slice(first, first + len(runs))
            optimizer = self._optimizer
            self._windows[key] = self._window_over(
                optimizer.numbers_KN[slots], optimizer.gradients_KN[slots], runs
            )
        return self._windows[key]

    def _window_over(
        self, numbers_GN: Tensor, gradients_GN: Tensor | None, runs: Sequence[SlotRun]
    ) -> Window:
        scales_G = torch.tensor([run.drawn.scale for run in runs], dtype=numbers_GN.dtype)
        return Window(
            self._stack.places,
            numbers_GN,
            gradients_GN,
            scales_G.to(numbers_GN.device),
            max(run.drawn.rank for run in runs),
            self._dtype,
        )

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
            self._optimizer.move(last.holder.slot, slot)
            last.holder.slot, self._runs[slot] = slot, last
        self._windows.clear()

    def _close(self, run: SlotRun) -> None:
        self._closing.remove(run)
        try:
            run.finish(self._engine.notes)
        except RunFailed as error:
            run.fail(error)
        self._ended.append(run.spec.run_dir)
