"""The training loop, read from top to bottom as the algorithm. Every method and layout uses it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch

from raytune_ft.checkpoints.store import step_name
from raytune_ft.config.identity import depends_on_horizon
from raytune_ft.config.schema import TrainConfig
from raytune_ft.data.order import example_indices
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import Diverged
from raytune_ft.model.methods import without_method
from raytune_ft.records import EvalMetrics, Point, StepMetrics
from raytune_ft.train.engine import Engine
from raytune_ft.train.evaluation import evaluate
from raytune_ft.train.heartbeat import Heartbeat
from raytune_ft.train.optim import learning_rate, total_examples
from raytune_ft.train.report import Reporter
from raytune_ft.train.saver import Saver
from raytune_ft.train.state import Progress
from raytune_ft.train.step import accumulate_gradients

Outcome = Literal["completed", "early_stopped", "interrupted"]


@dataclass(frozen=True)
class Objective:
    """Which evaluation is the best."""

    metric: str
    mode: str

    def improves(self, new: EvalMetrics, old: EvalMetrics | None, by: float = 0.0) -> bool:
        """Whether `new` is better than `old` by more than `by`."""
        if old is None:
            return True
        gain = getattr(new, self.metric) - getattr(old, self.metric)
        return bool((gain if self.mode == "max" else -gain) > by)


@dataclass(frozen=True)
class Schedule:
    """When something happens, in examples of the whole job."""

    batch_size: int
    total_examples: int
    eval_every: int
    save_every: int
    extendable: bool

    @classmethod
    def of(cls, train: TrainConfig, available: int, save_every: int) -> Schedule:
        """The schedule of a run over `available` training examples."""
        return cls(
            train.batch_size,
            total_examples(train, available),
            train.eval_every_examples,
            save_every,
            extendable=not depends_on_horizon(train),
        )

    @property
    def total_steps(self) -> int:
        """The last step takes what remains."""
        return math.ceil(self.total_examples / self.batch_size)

    def examples_after(self, step: int) -> int:
        """Examples seen once `step` steps are done."""
        return min(step * self.batch_size, self.total_examples)

    def due(self, step: int, every: int) -> bool:
        """Is `step` the first at or past a multiple of `every`, or the last of all?"""
        before, after = self.examples_after(step - 1), self.examples_after(step)
        return after // every > before // every or step == self.total_steps

    def save_due(self, step: int) -> bool:
        """Is a checkpoint due? One is before a last step that is not full, since a larger budget
        would fill that step.
        """
        last_is_partial = self.total_examples % self.batch_size > 0
        before_partial = step == self.total_steps - 1 and last_is_partial
        return self.due(step, self.save_every) or (self.extendable and before_partial)

    def is_on_the_way(self, step: int, examples: int) -> bool:
        """Does a run of this budget pass through such a state?"""
        return examples == self.examples_after(step)


def train(
    engine: Engine,
    data: TokenizedSplit,
    validation: TokenizedSplit,
    settings: TrainConfig,
    schedule: Schedule,
    seed: int,
    objective: Objective,
    progress: Progress,
    saver: Saver,
    log: Reporter,
    reporter: Reporter,
    should_stop: Callable[[], bool],
    heart: Heartbeat,
) -> tuple[Outcome, Progress]:
    """Train from `progress` to the end of the budget, an early stop or a request to stop.

    `log` hears of everything at once; `reporter` hears of an evaluation when the checkpoint that
    it earned is committed, so that whoever stops the run then finds it whole. Training goes on
    meanwhile, and all ranks report after the same step.

    Raises:
        Diverged: the loss, the gradient or an evaluation is not finite.
    """
    started = time.perf_counter() - progress.wall_s
    if progress.base is None:
        with without_method(engine.model):
            base = _measure(engine, validation, 0, 0, heart)
        progress = replace(progress, base=base)
        log.evaluation(base, None)
        reporter.evaluation(base, None)

    stopped = False
    with _Reports(saver, reporter) as reports:
        while (
            progress.step < schedule.total_steps
            and not stopped
            and not _exhausted(progress, settings)
        ):
            step_started = time.perf_counter()
            seen, step = progress.examples, progress.step + 1
            heart.enter(f"step {step}")
            examples = schedule.examples_after(step)
            indices = example_indices(seed, seen, examples - seen, len(data))
            _seed_noise(seed, step, engine.strategy.rank)

            loss, (stopped, writing) = accumulate_gradients(
                engine, data, indices, lambda: (should_stop(), saver.busy), heart.beat
            )
            lr = learning_rate(settings, progress.step, schedule.total_steps)
            grad_norm = engine.strategy.step(lr, settings.max_grad_norm)
            if not writing:
                reports.release()
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise Diverged(f"step {step}: loss {loss}, gradient norm {grad_norm}")

            now = time.perf_counter()
            progress = replace(progress, step=step, examples=examples, wall_s=now - started)
            tokens = int(data.lengths[indices].sum())
            metrics = StepMetrics(
                step=step,
                examples=examples,
                tokens=tokens,
                label_tokens=int(data.label_counts[indices].sum()),
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                tokens_per_s=tokens / (now - step_started),
                wall_s=progress.wall_s,
            )
            log.step(metrics)
            reporter.step(metrics)

            evaluation, is_best = None, False
            if schedule.due(step, schedule.eval_every):
                evaluation = _measure(engine, validation, step, examples, heart)
                is_best = objective.improves(evaluation, progress.best)
                progress = _after_evaluation(progress, evaluation, settings, objective)
                log.evaluation(evaluation, None)
            ending = stopped or _exhausted(progress, settings)
            if is_best or ending or schedule.save_due(step):
                heart.enter(f"checkpoint of step {step}")
                reports.release()
                saver.save(progress, evaluation)
            if evaluation is not None:
                reports.hold(evaluation, _checkpoint(step) if is_best else None)
        heart.enter("last checkpoint")
    if progress.step == schedule.total_steps:
        return "completed", progress
    return ("early_stopped" if _exhausted(progress, settings) else "interrupted"), progress


class _Reports(AbstractContextManager["_Reports"]):
    """Evaluations on their way to the reporter, in order.

    All of them have arrived on exit, also where the run diverged, which all ranks see alike.
    """

    def __init__(self, saver: Saver, reporter: Reporter) -> None:
        self._saver, self._reporter = saver, reporter
        self._held: list[tuple[EvalMetrics, str | None]] = []

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Diverged):
            self.release()

    def hold(self, evaluation: EvalMetrics, checkpoint: str | None) -> None:
        """Where no checkpoint is to be waited for, it is passed on at once."""
        self._held.append((evaluation, checkpoint))
        if all(path is None for _, path in self._held):
            self._pass_on()

    def release(self) -> None:
        """Wait for the checkpoint that is being written, then pass everything on."""
        self._saver.wait()
        self._pass_on()

    def _pass_on(self) -> None:
        for evaluation, checkpoint in self._held:
            self._reporter.evaluation(evaluation, checkpoint)
        self._held.clear()


def _exhausted(progress: Progress, settings: TrainConfig) -> bool:
    """Is patience at an end?"""
    stopping = settings.early_stopping
    return stopping is not None and progress.unimproved >= stopping.patience


def _measure(
    engine: Engine, validation: TokenizedSplit, step: int, examples: int, heart: Heartbeat
) -> EvalMetrics:
    heart.enter(f"evaluation after step {step}")
    scores = evaluate(engine, validation, heart.beat)
    if not math.isfinite(scores.loss):
        raise Diverged(f"step {step}: evaluation loss {scores.loss}")
    return EvalMetrics(step, examples, scores.loss, scores.token_accuracy, scores.exact_match)


def _after_evaluation(
    progress: Progress, evaluation: EvalMetrics, settings: TrainConfig, objective: Objective
) -> Progress:
    """Best, final and the count of evaluations without an improvement."""
    min_delta = settings.early_stopping.min_delta if settings.early_stopping else 0.0
    enough = objective.improves(evaluation, progress.best, by=min_delta)
    point = Point(**asdict(evaluation))
    best = progress.best
    if objective.improves(evaluation, best):
        best = replace(point, checkpoint=_checkpoint(evaluation.step))
    return replace(
        progress, best=best, final=point, unimproved=0 if enough else progress.unimproved + 1
    )


def _checkpoint(step: int) -> str:
    return f"checkpoints/{step_name(step)}"


def _seed_noise(seed: int, step: int, rank: int) -> None:
    """Dropout is a function of seed, step and rank, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
