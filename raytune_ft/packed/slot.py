"""One run among many that train in one process: its place in the data, its rules, its files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raytune_ft.checkpoints.store import CheckpointStore
from raytune_ft.config.identity import config_sha256
from raytune_ft.data.batch import Row
from raytune_ft.data.order import Indices
from raytune_ft.data.prepare import PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import CheckpointError, Diverged, RunFailed
from raytune_ft.layout import CHECKPOINTS, checkpoint_path
from raytune_ft.model.export import Exporter
from raytune_ft.packed.lora import Drawn, MultiLora
from raytune_ft.packed.optim import PackedAdamW, Step
from raytune_ft.records import EvalMetrics, StepMetrics
from raytune_ft.strategy import Strategy
from raytune_ft.strategy.exchange import Exchange
from raytune_ft.tensors.write import Part
from raytune_ft.train.checkpoint import Identity, Progress, Saver, load_state
from raytune_ft.train.evaluation import Scores
from raytune_ft.train.optim import learning_rate
from raytune_ft.train.report import Reporter, Reports, Several
from raytune_ft.train.result import run_result, write_ended, write_result
from raytune_ft.train.run_state import (
    Goal,
    Schedule,
    after_evaluation,
    check_finite,
    exhausted,
    outcome,
)
from raytune_ft.train.setup import order_of, where_to_resume
from raytune_ft.train.spec import RunSpec
from raytune_ft.train.trackers import Log
from raytune_ft.train.watchdog import Heartbeat


class OpenStep:
    """The examples that no pass has had yet, longest first, and what the others came to.

    `label_tokens` and `tokens` are those of the whole step, and `count` is what its losses are
    divided by; `loss_sum` is this rank's.
    """

    def __init__(self, data: TokenizedSplit, indices: Indices, count: float) -> None:
        self._data, self.count = data, count
        lengths = data.lengths[indices]
        self._waiting = indices[np.argsort(-lengths, kind="stable")]
        self.waiting_lengths: list[int] = data.lengths[self._waiting].tolist()
        self.label_tokens = int(data.label_counts[indices].sum())
        self.tokens, self.loss_sum = int(lengths.sum()), 0.0

    def take(self, rows: Sequence[Row]) -> list[list[int]]:
        """The examples at these positions of `waiting_lengths`, which wait no longer."""
        taken = [self._waiting[list(row)].tolist() if row else [] for row in rows]
        left = np.ones(len(self._waiting), bool)
        left[[position for row in rows for position in row]] = False
        self._waiting = self._waiting[left]
        self.waiting_lengths = self._data.lengths[self._waiting].tolist()
        return taken


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


class SlotRun:
    """Does for one slot what `train.loop` does for a run, while the engine runs the model.

    Every rank has it and decides alike, by sums over ranks; the first one writes its files.

    Raises:
        CheckpointError: the checkpoint to go on from is of another model or method.
    """

    def __init__(
        self,
        spec: RunSpec,
        data: PreparedData,
        open_step: Callable[[Indices], OpenStep],
        drawn: Drawn,
        holder: SlotHolder,
        strategy: Strategy,
        reporter: Reporter,
        heart: Heartbeat,
        pool: Executor,
    ) -> None:
        config = spec.config
        self.spec, self.drawn, self.holder = spec, drawn, holder
        self._open_step, self._settings = open_step, config.train
        self._order = order_of(config, data)
        self._goal = Goal(spec.metric, spec.mode)
        self._schedule = Schedule.of(
            config.train,
            len(self._order),
            config.checkpoint.every_examples,
            config.data.curriculum,
        )
        self._store = CheckpointStore(spec.run_dir / CHECKPOINTS)
        checkpoint = where_to_resume(self._store, self._schedule, strategy)
        self.progress = _load(checkpoint, holder, strategy) if checkpoint else Progress()
        self._started = time.perf_counter() - self.progress.wall_s
        self._saver = Saver(
            self._store,
            Identity(config_sha256(config), config.method.name, spec.metric, spec.mode),
            config.checkpoint,
            holder,
            holder.names,
            Exporter(drawn.model, torch.float32),
            pool,
        )
        self._saver.alive = heart.alive
        resume_step = self.progress.step if checkpoint else None
        self._log = Log(spec, resume_step) if strategy.rank == 0 else None
        self._both = Several([self._log, reporter] if self._log else [reporter])
        self._reports = Reports(self._saver, reporter)
        self._evaluation: EvalMetrics | None = None
        self._begin_step()

    def begin(self, base: Scores) -> None:
        """Before the first step; `base` is the model's without any adapter.

        Raises:
            Diverged: it is not finite.
        """
        if self.progress.base is None:
            evaluation = self._metrics_of(base)
            self.progress = replace(self.progress, base=evaluation)
            self._both.evaluation(evaluation, None)

    @property
    def over(self) -> bool:
        """Does the run go no further?"""
        done = self.progress.step >= self._schedule.total_steps
        return done or exhausted(self.progress, self._settings)

    @property
    def pending(self) -> bool:
        """Has a checkpoint been begun that nobody has waited for? Alike on all ranks."""
        return self._saver.pending

    @property
    def writing(self) -> bool:
        """Is a checkpoint being written on this rank?"""
        return self._saver.busy

    def _begin_step(self) -> None:
        seen, step = self.progress.examples, self.progress.step + 1
        self._examples = self._schedule.examples_after(step)
        self.open = self._open_step(self._order.indices(seen, self._examples - seen))
        self._step_started = time.perf_counter()

    def next_step(self) -> Step:
        """What the optimizer is to do once no example waits."""
        lr = learning_rate(self._settings, self.progress.step, self._schedule.total_steps)
        return Step(self.holder.slot, lr, self._settings)

    def after_step(self, loss_sum: float, lr: float, grad_norm: float) -> bool:
        """Note the step; is an evaluation due? `loss_sum` and `grad_norm` are those of all ranks.

        Raises:
            Diverged: the loss or the gradient is not finite.
        """
        step, loss = self.progress.step + 1, loss_sum / self.open.count
        check_finite(step, loss, grad_norm)
        now = time.perf_counter()
        self._evaluation = None
        self.progress = replace(
            self.progress, step=step, examples=self._examples, wall_s=now - self._started
        )
        self._both.step(
            StepMetrics(
                step=step,
                examples=self._examples,
                tokens=self.open.tokens,
                label_tokens=self.open.label_tokens,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                tokens_per_s=self.open.tokens / (now - self._step_started),
                wall_s=self.progress.wall_s,
            )
        )
        return self._schedule.due(step, self._schedule.eval_every)

    def settle(self, scores: Scores | None) -> None:
        """Take note of an evaluation, if one was due, save if that is due, and go on.

        Raises:
            Diverged: the evaluation is not finite.
            CheckpointError: an earlier checkpoint could not be written.
        """
        step, is_best = self.progress.step, False
        if scores is not None:
            evaluation = self._evaluation = self._metrics_of(scores)
            is_best = self._goal.improves(evaluation, self.progress.best)
            self.progress = after_evaluation(self.progress, evaluation, self._settings, self._goal)
            if self._log:
                self._log.evaluation(evaluation, None)
        if is_best or self.over or self._schedule.save_due(step):
            self._reports.release()
            self._saver.save(self.progress, self._evaluation)
        if self._evaluation is not None:
            self._reports.hold(self._evaluation, checkpoint_path(step) if is_best else None)
        if not self.over:
            self._begin_step()

    def pass_on(self) -> None:
        """Tell the reporter what waited for the last checkpoint.

        Raises:
            CheckpointError: it could not be written.
        """
        self._reports.release()

    def finish(self, notes: tuple[str, ...]) -> None:
        """Wait for the last checkpoint and leave the result of a run that is over.

        Raises:
            CheckpointError: it could not be written.
        """
        self._reports.release()
        status = outcome(self.progress, self._settings, self._schedule)
        if self._log:
            run_dir, config = self.spec.run_dir, self.spec.config
            write_result(run_dir, run_result(status, self.progress, run_dir, config, notes))
            self._log.close()

    def fail(self, error: RunFailed) -> None:
        """Leave the result of a run that failed."""
        if isinstance(error, Diverged):
            with suppress(CheckpointError):
                self._reports.release()
        self._end("failed", f"{type(error).__name__}: {error}")

    def leave(self, status: Literal["pruned", "interrupted"], notes: tuple[str, ...]) -> None:
        """End after the last whole step; an interrupted run has a checkpoint of it.

        Raises:
            CheckpointError: it could not be written.
        """
        if status == "pruned":
            self._saver.wait()
            self._end("pruned")
            return
        if self.progress.step:
            self._saver.save(self.progress, self._evaluation)
        self.finish(notes)

    def _end(self, status: Literal["failed", "pruned"], error: str | None = None) -> None:
        if self._log:
            write_ended(self.spec, status, error)
            self._log.close()

    def _metrics_of(self, scores: Scores) -> EvalMetrics:
        return scores.after(self.progress.step, self.progress.examples)


def _load(checkpoint: Path, holder: SlotHolder, strategy: Strategy) -> Progress:
    """Every rank reads all of it; where one cannot, none goes on. Raises CheckpointError."""
    progress, failure = Progress(), None
    try:
        progress = load_state(checkpoint, holder, holder.names)
    except CheckpointError as error:
        failure = error
    failed = torch.tensor([float(failure is not None)], device=strategy.device)
    if strategy.sum(failed).item() > 0:
        raise failure or CheckpointError(f"{checkpoint} cannot be read on another rank")
    return progress
