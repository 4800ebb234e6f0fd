"""When a trial is stopped, without a cluster."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from raytune_ft.config.search import AshaConfig, HyperbandConfig, MedianConfig
from raytune_ft.ray_backend.schedulers import ResumableScheduler, scheduler_for

BUDGET = 900


def asha(mode: str = "min") -> ResumableScheduler:
    config = AshaConfig(grace_examples=100, reduction_factor=3)
    return scheduler_for(config, BUDGET, "eval_loss", mode)


def begin(scheduler: ResumableScheduler, name: str, budget: float = BUDGET) -> Any:
    trial = SimpleNamespace(trial_id=f"tune-{name}", config={"trial": name, "budget": budget})
    scheduler.on_trial_add(None, trial)
    return trial


def decide(scheduler: ResumableScheduler, trial: Any, examples: int, loss: float) -> str:
    return scheduler.on_trial_result(None, trial, {"examples": examples, "eval_loss": loss})


@pytest.mark.parametrize(("mode", "good", "bad"), [("min", 1.0, 2.0), ("max", 2.0, 1.0)])
def test_the_worse_trial_stops_at_a_rung_and_not_before(mode: str, good: float, bad: float) -> None:
    scheduler = asha(mode)
    first, second = begin(scheduler, "a"), begin(scheduler, "b")
    assert decide(scheduler, first, 104, good) == TrialScheduler.CONTINUE
    assert decide(scheduler, second, 96, bad) == TrialScheduler.CONTINUE
    assert decide(scheduler, second, 104, bad) == TrialScheduler.STOP


def test_the_base_is_no_rung() -> None:
    scheduler = asha()
    good, other = begin(scheduler, "a"), begin(scheduler, "b")
    for trial in (good, other):
        assert decide(scheduler, trial, 0, 5.0) == TrialScheduler.CONTINUE
    decide(scheduler, good, 100, 1.0)
    assert decide(scheduler, other, 0, 9.0) == TrialScheduler.CONTINUE


@pytest.mark.parametrize("budget", [BUDGET, 300])
def test_nobody_is_stopped_at_the_end_of_the_budget(budget: int) -> None:
    scheduler = asha()
    good, late = begin(scheduler, "a"), begin(scheduler, "b", budget)
    for examples in (100, 300, 600):
        decide(scheduler, good, examples, 1.0)
    assert decide(scheduler, late, budget, 9.0) == TrialScheduler.CONTINUE


def test_rungs_remember_an_earlier_driver() -> None:
    scheduler = asha()
    scheduler.recall("a", {100: 1.0, 300: 0.5})
    bad = begin(scheduler, "b")
    assert decide(scheduler, bad, 100, 2.0) == TrialScheduler.STOP
    again = begin(scheduler, "a")  # resumed from its checkpoint, it reports once more
    assert decide(scheduler, again, 100, 1.0) == TrialScheduler.CONTINUE
    assert decide(scheduler, begin(scheduler, "c"), 300, 0.4) == TrialScheduler.CONTINUE


def test_a_budget_below_the_grace_period_stops_nobody() -> None:
    scheduler = scheduler_for(AshaConfig(grace_examples=100), 50, "eval_loss", "min")
    assert decide(scheduler, begin(scheduler, "a", math.inf), 60, 1.0) == TrialScheduler.CONTINUE
    assert decide(scheduler, begin(scheduler, "b", math.inf), 60, 2.0) == TrialScheduler.CONTINUE


def median(mode: str = "min") -> ResumableScheduler:
    config = MedianConfig(name="median", grace_examples=100, min_trials=2)
    return scheduler_for(config, BUDGET, "eval_loss", mode)


@pytest.mark.parametrize(("mode", "good", "bad"), [("min", 1.0, 2.0), ("max", 2.0, 1.0)])
def test_median_stops_who_is_worse_than_most_and_never_pauses(
    mode: str, good: float, bad: float
) -> None:
    rule = median(mode)
    trials = [begin(rule, name) for name in "abc"]
    assert decide(rule, trials[2], 110, bad) == TrialScheduler.CONTINUE  # nobody to compare with
    for trial in trials[:2]:
        assert decide(rule, trial, 110, good) == TrialScheduler.CONTINUE
        assert decide(rule, trial, 220, good) == TrialScheduler.CONTINUE
    late = begin(rule, "d")
    assert decide(rule, late, 50, bad) == TrialScheduler.CONTINUE
    assert decide(rule, late, 110, bad) == TrialScheduler.STOP
    assert decide(rule, begin(rule, "e", 110), 110, bad) == TrialScheduler.CONTINUE


def test_median_remembers_an_earlier_driver_and_counts_nothing_twice() -> None:
    rule = median()
    for name in "ab":
        rule.recall(name, {100: 1.0, 200: 1.0})
    again = begin(rule, "a")
    assert decide(rule, again, 200, 9.0) == TrialScheduler.CONTINUE
    assert decide(rule, begin(rule, "c"), 200, 1.1) == TrialScheduler.STOP


def test_a_replay_that_median_would_have_stopped_does_not_end_the_resumed_trial() -> None:
    """Trials are replayed one after the other, so that each sees more of the others than before;
    and a driver may die between the decision and the end of the trial.
    """
    rule = median()
    for name, loss in {"a": 1.0, "b": 1.0, "worse": 2.0, "better": 2.0}.items():
        rule.recall(name, {100: loss})
    worse, better = begin(rule, "worse"), begin(rule, "better")
    assert decide(rule, worse, 100, 2.0) == TrialScheduler.CONTINUE  # it reports once more
    assert decide(rule, begin(rule, "a"), 200, 1.0) == TrialScheduler.CONTINUE
    assert decide(rule, begin(rule, "b"), 200, 1.0) == TrialScheduler.CONTINUE
    assert decide(rule, worse, 200, 1.9) == TrialScheduler.STOP
    assert decide(rule, better, 200, 0.5) == TrialScheduler.CONTINUE
    assert decide(rule, better, 300, 0.4) == TrialScheduler.CONTINUE


def test_hyperband_gives_a_trial_the_same_bracket_again() -> None:
    config = HyperbandConfig(name="hyperband", grace_examples=100, brackets=3)
    names = [f"trial-{number:03d}" for number in range(60)]
    found = []
    for _ in range(2):
        rule = scheduler_for(config, BUDGET, "eval_loss", "min")
        for name in names:
            begin(rule, name)
        inner: Any = rule.rule
        found.append([inner._brackets.index(inner._trial_info[name]) for name in names])
    assert found[0] == found[1]
    assert found[0].count(0) > found[0].count(1) > found[0].count(2) > 0
    early, late = (names[found[0].index(bracket)] for bracket in (0, 1))
    others = [name for name in names if name not in (early, late)]
    for name in others:
        decide(rule, begin(rule, name), 100, 1.0)
    assert decide(rule, begin(rule, late), 100, 2.0) == TrialScheduler.CONTINUE
    assert decide(rule, begin(rule, early), 100, 2.0) == TrialScheduler.STOP
