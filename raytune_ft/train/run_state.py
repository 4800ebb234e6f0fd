"""When something is due in a run and what an evaluation changes: pure, for one run or many."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

from raytune_ft.config.data import CurriculumConfig
from raytune_ft.config.identity import depends_on_horizon
from raytune_ft.config.train import TrainConfig
from raytune_ft.errors import Diverged
from raytune_ft.layout import checkpoint_path
from raytune_ft.records import EvalMetrics, Point
from raytune_ft.train.checkpoint import Progress
from raytune_ft.train.optim import total_examples

Outcome = Literal["completed", "early_stopped", "interrupted"]


@dataclass(frozen=True)
class Goal:
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


def check_finite(step: int, loss: float, grad_norm: float) -> None:
    """Raises Diverged where a step went nowhere."""
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise Diverged(f"step {step}: loss {loss}, gradient norm {grad_norm}")


def exhausted(progress: Progress, settings: TrainConfig) -> bool:
    """Is patience at an end?"""
    stopping = settings.early_stopping
    return stopping is not None and progress.unimproved >= stopping.patience


def outcome(progress: Progress, settings: TrainConfig, schedule: Schedule) -> Outcome:
    """How a run that stands here, and goes no further, ended."""
    if progress.step == schedule.total_steps:
        return "completed"
    return "early_stopped" if exhausted(progress, settings) else "interrupted"


def after_evaluation(
    progress: Progress, evaluation: EvalMetrics, settings: TrainConfig, goal: Goal
) -> Progress:
    """Best, final and the count of evaluations without an improvement."""
    min_delta = settings.early_stopping.min_delta if settings.early_stopping else 0.0
    enough = goal.improves(evaluation, progress.best, by=min_delta)
    point = Point(**asdict(evaluation))
    best = progress.best
    if goal.improves(evaluation, best):
        best = replace(point, checkpoint=checkpoint_path(evaluation.step))
    return replace(
        progress, best=best, final=point, unimproved=0 if enough else progress.unimproved + 1
    )
