"""A run between its steps: what is due, what an evaluation changes, what is saved and reported."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from raytune_ft.config.data import CurriculumConfig
from raytune_ft.config.identity import depends_on_horizon
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.arrays import Indices
from raytune_ft.data.order import Order
from raytune_ft.errors import CheckpointError, Diverged, RunFailed
from raytune_ft.layout import checkpoint_path
from raytune_ft.records import EvalMetrics, Point, Progress, RunResult, StepMetrics
from raytune_ft.rundir import RunSpec
from raytune_ft.train.checkpoint import Saver
from raytune_ft.train.evaluation import Scores
from raytune_ft.train.material import Work
from raytune_ft.train.optim import learning_rate, total_examples
from raytune_ft.train.report import Reporter
from raytune_ft.train.result import Outcome, end_run, failed_result, run_result
from raytune_ft.train.trackers import Log
from raytune_ft.train.usage import Usage
from raytune_ft.train.watchdog import Heartbeat


@dataclass(frozen=True)
class Goal:
    """Which evaluation is the best."""

    metric: str
    mode: str

    def improves(self, new: EvalMetrics, old: EvalMetrics | None, by: float = 0.0) -> bool:
        """Whether `new` is better than `old` by more than `by`."""
        if old is None:
            return True
        gain = new.value(self.metric) - old.value(self.metric)
        return (gain if self.mode == "max" else -gain) > by


@dataclass(frozen=True)
class Schedule:
    """When something happens, in examples of the whole job."""

    batch_size: int
    total_examples: int
    eval_every: int
    save_every: int
    extendable: bool
    generation: int = 1
    iterations: int = 1

    @classmethod
    def of(
        cls,
        train: TrainConfig,
        available: int,
        save_every: int,
        curriculum: CurriculumConfig | None = None,
    ) -> Schedule:
        """The schedule of a run whose epochs have `available` training examples."""
        return cls(
            train.batch_size,
            total_examples(train, available),
            train.eval_every_examples,
            save_every,
            extendable=depends_on_horizon(train, curriculum) is None,
            generation=train.rollout.steps_per_generation,
            iterations=train.rollout.num_iterations,
        )

    @property
    def total_steps(self) -> int:
        """The last step takes what remains."""
        return math.ceil(self.total_examples / self.batch_size)

    def examples_after(self, step: int) -> int:
        """Examples seen once `step` steps are done."""
        return min(step * self.batch_size, self.total_examples)

    def place(self, step: int) -> tuple[int, int]:
        """Where in the stream of examples those of a step begin, and how many they are.

        The steps of a rollout are taken `iterations` times before those of the next one.
        """
        rollout, within = divmod(step - 1, self.generation * self.iterations)
        place = rollout * self.generation + within % self.generation
        return place * self.batch_size, self.examples_after(step) - self.examples_after(step - 1)

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


class RunState:
    """The state of a run between two steps. The code that computes gradients drives it:

        run.begin(scores of the base)
        while not run.over:
            work = ...                                  # of `run.step`, see `train.material`
            ...                                         # forward, backward, step at `run.lr`
            if run.after_step(work, loss, grad_norm):   # an evaluation is due
                scores = ...
            run.after_evaluation(scores)                # None where none was due
        run.finish(notes)

    `train.loop` drives one state, `packed.engine` one for each slot. Every rank holds the state and
    makes the same decisions, from sums over ranks. Only rank 0 has a `log`, which gets every metric
    at once. The `reporter` gets an evaluation after its checkpoint is committed: a search that
    stops the run on that report then finds the checkpoint. Training continues meanwhile.
    """

    def __init__(
        self,
        spec: RunSpec,
        order: Order,
        schedule: Schedule,
        progress: Progress,
        saver: Saver,
        log: Log | None,
        reporter: Reporter,
        heart: Heartbeat,
        usage: Usage,
    ) -> None:
        """`heart` gets the name of every phase."""
        self.spec, self.progress, self.saver = spec, progress, saver
        self._settings = spec.config.train
        self._order, self._schedule = order, schedule
        self._goal = Goal(spec.metric, spec.mode)
        self._log, self._reporter, self._heart, self._usage = log, reporter, heart, usage
        self._started = time.perf_counter() - progress.wall_s
        self._evaluation: EvalMetrics | None = None  # of the last step
        self._held: list[tuple[EvalMetrics, str | None]] = []

    @property
    def step(self) -> int:
        """The step to be taken next, from 1."""
        return self.progress.step + 1

    @property
    def lr(self) -> float:
        """The learning rate of that step."""
        return learning_rate(self._settings, self.progress.step, self._schedule.total_steps)

    @property
    def over(self) -> bool:
        """Is the budget or the patience of early stopping used up?"""
        return self.progress.step >= self._schedule.total_steps or self._out_of_patience

    def begin(self, base: Scores) -> None:
        """Report the base's own scores, before the first step.

        Raises:
            Diverged: they are not finite.
        """
        evaluation = self._finite(base.after(0, 0))
        self.progress = replace(self.progress, base=evaluation)
        if self._log:
            self._log.evaluation(evaluation, None)
        self._reporter.evaluation(evaluation, None)

    @property
    def remaining(self) -> range:
        """The numbers of the steps to come, to the end of the budget."""
        return range(self.step, self._schedule.total_steps + 1)

    def place(self, step: int) -> tuple[int, int]:
        """See `Schedule.place`."""
        return self._schedule.place(step)

    def examples(self, start: int, count: int) -> Indices:
        """Examples of the training split, by their places in the stream."""
        return self._order.indices(start, count)

    def after_step(self, work: Work, loss: float, grad_norm: float) -> bool:
        """Note a step, with the loss and gradient norm of all ranks; is an evaluation due?

        Raises:
            Diverged: the loss or the gradient is not finite.
        """
        step, lr = self.step, self.lr
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise self._diverged(step, f"loss {loss}, gradient norm {grad_norm}", step - 1)
        now = time.perf_counter()
        self._evaluation = None
        self.progress = replace(
            self.progress,
            step=step,
            examples=self.progress.examples + len(work.examples),
            wall_s=now - self._started,
        )
        tokens = sum(work.split.part_lengths(work.indices))
        tokens_per_s = tokens / (now - work.began)
        metrics = StepMetrics(
            step=step,
            examples=self.progress.examples,
            tokens=tokens,
            label_tokens=int(work.split.labels_of(work.indices).sum()),
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=tokens_per_s,
            wall_s=self.progress.wall_s,
            peak_gib=self._usage.peak_gib,
            mfu=self._usage.mfu(tokens_per_s),
            figures=work.figures,
        )
        if self._log:
            self._log.step(metrics)
        self._reporter.step(metrics)
        return self._schedule.due(step, self._schedule.eval_every)

    def after_evaluation(self, scores: Scores | None, stopping: bool = False) -> None:
        """Note the evaluation of this step, None where none was due; save where that is due.

        A new best, the last step and, where the run is `stopping`, this one are always saved.

        Raises:
            Diverged: the evaluation is not finite.
            CheckpointError: an earlier checkpoint could not be written.
        """
        step, is_best = self.progress.step, False
        if scores is not None:
            evaluation = self._finite(scores.after(step, self.progress.examples))
            self._evaluation = evaluation
            is_best = self._goal.improves(evaluation, self.progress.best)
            self.progress = after_evaluation(self.progress, evaluation, self._settings, self._goal)
            if self._log:
                self._log.evaluation(evaluation, None)
        if is_best or stopping or self.over or self._schedule.save_due(step):
            self._save()
        if self._evaluation is not None:
            self._held.append((self._evaluation, checkpoint_path(step) if is_best else None))
            if all(checkpoint is None for _, checkpoint in self._held):
                self._pass_on()

    def _finite(self, evaluation: EvalMetrics) -> EvalMetrics:
        """The evaluation itself. Raises Diverged where its loss is not finite."""
        step, loss = evaluation.step, evaluation.eval_loss
        if not math.isfinite(loss):
            raise self._diverged(step, f"evaluation loss {loss}", step)
        return evaluation

    def _diverged(self, step: int, what: str, updates: int) -> Diverged:
        """The error of a step that computed `what`. `updates` of the weights came before it."""
        settings = self._settings
        remedy = (
            "no update precedes it, so train.lr is not the cause: write another train.precision "
            "or model.dtype, or look for extreme weights or numbers in the data"
        )
        if updates:
            clip = " and train.max_grad_norm=1.0" * (settings.max_grad_norm is None)
            remedy = (
                f"write a train.lr below {settings.lr:g}{clip}; if the same step fails again, look "
                "for extreme weights or numbers in the data"
            )
        return Diverged(f"step {step}: {what}; {remedy}")

    def release(self) -> None:
        """Wait for the checkpoint that is being written, then report what waited for it.

        Raises:
            CheckpointError: it could not be written.
        """
        self.saver.wait()
        self._pass_on()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """At the end of the context, report every evaluation that waits for its checkpoint.

        Also where the run diverged, because all ranks see that; not after other errors.
        """
        try:
            yield
        except Diverged:
            self.release()
            raise
        self._heart.enter("last checkpoint")
        self.release()

    def finish(self, notes: tuple[str, ...], hosted: bool = False) -> RunResult:
        """Leave the result of a run that goes no further; see `train.result.end_run`.

        Where the run is `hosted`, its host knows why it was interrupted and writes that result.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        self.release()
        result = run_result(self._outcome(), self.progress, self.spec, notes)
        if self._log and not (hosted and result.status == "interrupted"):
            end_run(self.spec, result)
        self.close()
        return result

    def fail(self, error: RunFailed) -> None:
        """End a run that failed by itself."""
        if isinstance(error, Diverged):
            with suppress(CheckpointError):
                self.release()
        if self._log:
            end_run(self.spec, failed_result(self.spec, error))
        self.close()

    def prune(self) -> None:
        """End a run that its search has stopped, after the last whole step.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """
        self.saver.wait()
        if self._log:
            end_run(self.spec, "pruned")
        self.close()

    def interrupt(self, notes: tuple[str, ...]) -> None:
        """End a run after the last whole step, with a checkpoint of it to continue from.

        Raises:
            CheckpointError: it could not be written.
        """
        if self.progress.step:
            self._save()
        self.finish(notes)

    def close(self) -> None:
        """Close the log. `finish`, `fail` and `prune` do so; a second call does nothing."""
        log, self._log = self._log, None
        if log:
            log.close()

    @property
    def _out_of_patience(self) -> bool:
        stopping = self._settings.early_stopping
        return stopping is not None and self.progress.unimproved >= stopping.patience

    def _outcome(self) -> Outcome:
        if self.progress.step == self._schedule.total_steps:
            return "completed"
        return "early_stopped" if self._out_of_patience else "interrupted"

    def _save(self) -> None:
        self._heart.enter(f"checkpoint of step {self.progress.step} of {self.spec.run_dir.name}")
        self.release()
        self.saver.save(self.progress, self._evaluation)

    def _pass_on(self) -> None:
        for evaluation, checkpoint in self._held:
            self._reporter.evaluation(evaluation, checkpoint)
        self._held.clear()


def after_evaluation(
    progress: Progress, evaluation: EvalMetrics, settings: TrainConfig, goal: Goal
) -> Progress:
    """Progress with this evaluation: best, final, and how many in a row have not improved."""
    min_delta = settings.early_stopping.min_delta if settings.early_stopping else 0.0
    enough = goal.improves(evaluation, progress.best, by=min_delta)
    point = Point(**vars(evaluation))
    best = progress.best
    if goal.improves(evaluation, best):
        best = replace(point, checkpoint=checkpoint_path(evaluation.step))
    return replace(
        progress, best=best, final=point, unimproved=0 if enough else progress.unimproved + 1
    )
