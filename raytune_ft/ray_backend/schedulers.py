"""When a trial is stopped before its end: Ray's own rules, over examples.

Each function here is the `implementation` of an entry of `config.search.SCHEDULERS`.
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

from raytune_ft.config.search import SCHEDULERS, AshaConfig, HyperbandConfig, MedianConfig


def asha(
    config: AshaConfig | HyperbandConfig,
    budget_examples: int,
    metric: str,
    mode: str,
) -> AsyncHyperBandScheduler:
    """Asynchronous successive halving; `budget_examples` of a usual trial limits the rungs."""
    return AsyncHyperBandScheduler(**_halving(config, budget_examples, metric, mode))


def hyperband(
    config: HyperbandConfig, budget_examples: int, metric: str, mode: str
) -> AsyncHyperBandScheduler:
    """ASHA with several first rungs."""
    settings = _halving(config, budget_examples, metric, mode)
    return _Hyperband(brackets=config.brackets, **settings)


def median(
    config: MedianConfig, budget_examples: int, metric: str, mode: str
) -> MedianStoppingRule:
    """Stops a trial whose best value is worse than the median of the others' means so far."""
    return _Median(
        time_attr="examples",
        metric=metric,
        mode=mode,
        grace_period=config.grace_examples,
        min_samples_required=config.min_trials,
    )


def _halving(
    config: AshaConfig | HyperbandConfig, budget_examples: int, metric: str, mode: str
) -> dict[str, Any]:
    return {
        "time_attr": "examples",
        "metric": metric,
        "mode": mode,
        "max_t": max(budget_examples, config.grace_examples),
        "grace_period": config.grace_examples,
        "reduction_factor": config.reduction_factor,
        "stop_last_trials": False,
    }


class _Hyperband(AsyncHyperBandScheduler):
    """A trial's bracket is a function of its id, so that a resume finds it again; Ray draws it."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        weights = np.exp([len(bracket._rungs) for bracket in self._brackets])
        chosen = random.Random(trial.trial_id).choices(self._brackets, weights.tolist())
        self._trial_info[trial.trial_id] = chosen[0]


class _Median(MedianStoppingRule):
    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ray asserts that a stopped trial reports no more. One that only a replay has stopped, or
        that its driver did not live to stop, does: it is judged again.
        """
        decision = super().on_trial_result(tune_controller, trial, result)
        self._stopped_trials.discard(trial)
        return str(decision)

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        """Continues, where Ray would pause the trial so that others get ahead."""
        return str(TrialScheduler.CONTINUE)


@dataclass(frozen=True)
class _NamedTrial:
    """A trial as the rule sees it; equal to another of the same name."""

    trial_id: str
    config: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)


class ResumableScheduler(FIFOScheduler):
    """Lets a rule of Ray decide, and gives it back what it knew before a resume.

    Ray's rules know a trial by Tune's id, which a resume changes, and their state dies with the
    driver. Here the rule sees each trial under its name, and `recall` replays the study.

    The rule does not see the evaluation of the untouched base, one at the end of a trial's own
    budget, where stopping saves nothing, or one that a resumed trial repeats.
    """

    def __init__(self, rule: TrialScheduler, metric: str) -> None:
        super().__init__()
        self.rule = rule
        self._judged_by = metric
        self._seen: dict[str, float] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.rule.on_trial_add(tune_controller, _named(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name, examples = trial.config["trial"], result.get("examples", 0)
        if not self._seen.get(name, 0) < examples < trial.config["budget"]:
            return str(TrialScheduler.CONTINUE)
        self._seen[name] = examples
        return str(self.rule.on_trial_result(tune_controller, _named(trial), result))

    def recall(self, trial: str, values: dict[int, float]) -> None:
        """Replays an earlier driver's evaluations of a trial: examples -> value of the metric."""
        stub = _NamedTrial(trial, {"trial": trial, "budget": math.inf})
        self.on_trial_add(None, stub)
        for examples, value in sorted(values.items()):
            self.on_trial_result(None, stub, {"examples": examples, self._judged_by: value})


def scheduler_for(config: Any, budget_examples: int, metric: str, mode: str) -> ResumableScheduler:
    """The scheduler of a `search.scheduler` section, before any trial."""
    rule = SCHEDULERS[config.name].implementation()
    return ResumableScheduler(rule(config, budget_examples, metric, mode), metric)


def _named(trial: Any) -> _NamedTrial:
    return _NamedTrial(trial.config["trial"])
