"""Many LoRA runs at once against one frozen base, in one process or on several ranks.

Each of them is the run that it would be alone, with its own seed, schedule, batch and end; only
the passes through the model are shared. When one ends, the next enters its slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from raytune_ft.config.execution import packable
from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import PreparedData
from raytune_ft.errors import ConfigError, RunFailed
from raytune_ft.model.drawn import Drawn, draw_adapter
from raytune_ft.packed.lora import Window
from raytune_ft.packed.slot import SlotRun
from raytune_ft.strategy import Strategy
from raytune_ft.train.ended import write_ended
from raytune_ft.train.evaluation import Scores
from raytune_ft.train.packed_holder import SlotHolder
from raytune_ft.train.packed_passes import Passes
from raytune_ft.train.report import Reporter
from raytune_ft.train.spec import RunSpec
from raytune_ft.train.watchdog import Heartbeat

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
