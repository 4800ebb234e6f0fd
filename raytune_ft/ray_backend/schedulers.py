"""When a trial is stopped before its end: Ray's own rules, over examples.

Ray's schedulers know a trial by Tune's id, which a resume changes, and their state dies with the
driver. Here a trial has its name, and the study fills the rules again.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from raytune_ft.config.search import AshaConfig, HyperbandConfig, MedianConfig, SchedulerConfig


@dataclass(frozen=True)
class _Named:
    """A trial as the rules see it; equal to another of the same name."""

    trial_id: str
    config: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)


class ByName(FIFOScheduler):
    """What the rules below have in common.

    The untouched base is not compared, nobody is stopped at the end of its own budget, where there
    is nothing left to save, and an evaluation that a resumed trial repeats is not counted again.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._seen: dict[str, float] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """See `TrialScheduler`."""
        super().on_trial_add(tune_controller, _named(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See `TrialScheduler`."""
        name, examples = trial.config["trial"], result.get("examples", 0)
        if not self._seen.get(name, 0) < examples < trial.config["budget"]:
            return str(TrialScheduler.CONTINUE)
        self._seen[name] = examples
        return str(super().on_trial_result(tune_controller, _named(trial), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """See `TrialScheduler`; an outcome is no evaluation, so that no rule hears of it."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """See `TrialScheduler`."""

    def recall(self, trial: str, values: dict[int, float]) -> None:
        """Takes an earlier driver's evaluations of a trial, by examples."""
        stub = _Named(trial, {"trial": trial, "budget": math.inf})
        self.on_trial_add(None, stub)
        for examples, value in sorted(values.items()):
            self.on_trial_result(None, stub, {"examples": examples, self.metric: value})


class Asha(ByName, AsyncHyperBandScheduler):
    """Asynchronous successive halving; `budget_examples` of a usual trial says how many rungs."""

    def __init__(
        self,
        config: AshaConfig | HyperbandConfig,
        budget_examples: int,
        metric: str,
        mode: str,
        brackets: int = 1,
    ) -> None:
        super().__init__(
            time_attr="examples",
            metric=metric,
            mode=mode,
            max_t=max(budget_examples, config.grace_examples),
            grace_period=config.grace_examples,
            reduction_factor=config.reduction_factor,
            brackets=brackets,
            stop_last_trials=False,
        )


class Hyperband(Asha):
    """ASHA with several first rungs. A trial's bracket is a function of its name, where Ray draws
    it anew, so that a resume finds it again.
    """

    def __init__(
        self, config: HyperbandConfig, budget_examples: int, metric: str, mode: str
    ) -> None:
        super().__init__(config, budget_examples, metric, mode, config.brackets)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """See `TrialScheduler`."""
        super().on_trial_add(tune_controller, trial)
        name = trial.config["trial"]
        weights = np.exp([len(bracket._rungs) for bracket in self._brackets])
        chosen = random.Random(name).choices(self._brackets, weights.tolist())
        self._trial_info[name] = chosen[0]


class Median(ByName, MedianStoppingRule):
    """Stops a trial whose best is worse than the median of the others' means until then."""

    def __init__(self, config: MedianConfig, metric: str, mode: str) -> None:
        super().__init__(
            time_attr="examples",
            metric=metric,
            mode=mode,
            grace_period=config.grace_examples,
            min_samples_required=config.min_trials,
        )

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        """Goes on, where Ray would pause the trial for the sake of others."""
        return str(TrialScheduler.CONTINUE)


def scheduler_for(
    config: SchedulerConfig, budget_examples: int, metric: str, mode: str
) -> Asha | Median:
    """The rule of a config, which knows of no trial yet."""
    match config:
        case MedianConfig():
            return Median(config, metric, mode)
        case HyperbandConfig():
            return Hyperband(config, budget_examples, metric, mode)
        case AshaConfig():
            return Asha(config, budget_examples, metric, mode)


def _named(trial: Any) -> _Named:
    return _Named(trial.config["trial"])
