"""The figures of runs as metrics of Ray, which its dashboard and Prometheus read.

Prometheus sees each name with the prefix `ray_`. All have the tag `run`, the run's or the sweep's
name, and all but those of a sweep as a whole the tag `trial`, empty for a run of its own. Ray drops
a figure that is not set again within two of its reports, 20 s by default.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray.util.metrics import Gauge

from raytune_ft.background import repeated
from raytune_ft.layout import CHECKPOINTS, MANIFEST, MIRROR_OWNER, TRIALS
from raytune_ft.records import EvalMetrics, StepMetrics

EVERY_S = 5.0
"""How often a driver sets its figures."""
TAGS = ("run", "trial")
STEP = "raytune_ft_step", "optimizer steps done"
EXAMPLES = "raytune_ft_examples", "training examples seen"
LOSS = "raytune_ft_loss", "loss of the last step"
STEP_TIME = "raytune_ft_step_time_s", "seconds that the last step took"
SPEED = "raytune_ft_tokens_per_s", "tokens a second in the last step"
EVAL_LOSS = "raytune_ft_eval_loss", "loss of the last evaluation"
CHECKPOINT_AGE = "raytune_ft_checkpoint_age_s", "seconds since the newest checkpoint was committed"
MIRROR_LAG = "raytune_ft_mirror_lag_s", "seconds since the object store had everything"
TRIALS_BY_STATE = "raytune_ft_trials", "trials of a sweep by state"


def names_of(run_dir: Path) -> dict[str, str]:
    """The tags of a run's or a trial's directory."""
    if run_dir.parent.name == TRIALS:
        return {"run": run_dir.parent.parent.name, "trial": run_dir.name}
    return {"run": run_dir.name, "trial": ""}


class RunGauges:
    """A `Reporter` that shows the last step and the last evaluation of one run."""

    def __init__(self, run_dir: Path) -> None:
        self._gauges = {
            name: Gauge(name, about, TAGS).set_default_tags(names_of(run_dir))
            for name, about in (STEP, EXAMPLES, LOSS, STEP_TIME, SPEED, EVAL_LOSS)
        }
        self._eval_loss: float | None = None

    def step(self, metrics: StepMetrics) -> None:
        self._set(STEP, metrics.step)
        self._set(EXAMPLES, metrics.examples)
        self._set(LOSS, metrics.loss)
        self._set(SPEED, metrics.tokens_per_s)
        self._set(STEP_TIME, metrics.tokens / metrics.tokens_per_s)
        if self._eval_loss is not None:
            self._set(EVAL_LOSS, self._eval_loss)

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        self._eval_loss = metrics.eval_loss
        self._set(EVAL_LOSS, metrics.eval_loss)

    def _set(self, gauge: tuple[str, str], value: float) -> None:
        self._gauges[gauge[0]].set(value)


class DriverGauges:
    """What the driver of a run or a sweep knows: the states of its trials, and the ages of files.

    A trial is counted under `running` until it has ended, then under how it ended.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._age = Gauge(*CHECKPOINT_AGE, TAGS)
        self._lag = Gauge(*MIRROR_LAG, ("run",))
        self._trials = Gauge(*TRIALS_BY_STATE, ("run", "state"))
        self._running: set[str] = set()
        self._counts: dict[str, int] = {}

    def started(self, trial: str) -> None:
        """A trial has started or resumed."""
        self._running.add(trial)

    def ended(self, trial: str, status: str) -> None:
        """A trial has ended, or was interrupted."""
        self._running.discard(trial)
        self._counts[status] = self._counts.get(status, 0) + 1

    def measure(self) -> None:
        """Set the figures as they are now; without a checkpoint or a mirror there is no age."""
        if self._running or self._counts:
            for state, number in {"running": len(self._running), **self._counts}.items():
                self._trials.set(number, {"run": self._run_dir.name, "state": state})
        trials = [self._run_dir / TRIALS / trial for trial in sorted(self._running)]
        for run_dir in trials or [self._run_dir]:
            times = [_time(path) for path in (run_dir / CHECKPOINTS).glob(f"step-*/{MANIFEST}")]
            if times:
                self._age.set(time.time() - max(times), names_of(run_dir))
        if mirrored := _time(self._run_dir / MIRROR_OWNER):
            self._lag.set(time.time() - mirrored, {"run": self._run_dir.name})


def _time(path: Path) -> float:
    """When a file was last written; 0 for one that is not there."""
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


@contextmanager
def measured(run_dir: Path, every_s: float = EVERY_S) -> Iterator[DriverGauges]:
    """Inside, a thread sets the figures of a driver that has joined Ray."""
    gauges = DriverGauges(run_dir)

    def measure() -> None:
        with suppress(OSError):  # a folder that vanishes meanwhile
            gauges.measure()

    with repeated(measure, every_s, "gauges"):
        yield gauges
