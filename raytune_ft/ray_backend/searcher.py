"""Connects Optuna to Ray Tune: which trial comes next, and how it ended.

Ray's OptunaSearch is not used: it reports a trial that ASHA stopped as complete, never ends a trial
with a NaN, and merges sweeps that share a storage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import optuna
from ray.tune.search import Searcher

from raytune_ft.config.search import SearchConfig
from raytune_ft.config.search_space import Point, trial_count
from raytune_ft.errors import ConfigError
from raytune_ft.search.results import trial_name
from raytune_ft.search.sampler import JointSampler
from raytune_ft.search.space import decode
from raytune_ft.search.study import (
    live,
    own_trials,
    report,
    tell_failed,
    tell_outcome,
    tell_pruned,
    unfinished,
)

Prepare = Callable[[str, dict[str, Any]], int]


class OfThisProcess:
    """Is neither copied nor pickled. Tune does both, for a restore that is not used here."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class StudySearcher(OfThisProcess, Searcher):
    """Hands out trials: first the unfinished ones of an earlier driver, then new ones.

    `prepare` makes a trial's directory and returns the examples that it will see; if it raises
    ConfigError, that trial fails and the next one is drawn. While `held` is true, or `at_once`
    trials run, no trial is drawn; once `over` is true, no further trial is. `at_once` follows the
    room of the cluster.
    """

    def __init__(
        self,
        study: optuna.Study,
        search: SearchConfig,
        seed: int,
        prepare: Prepare,
        held: Callable[[], bool] = lambda: False,
        points: Sequence[Point] = (),
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(metric=search.metrics[0], mode=search.modes[0])
        self._study, self._search = study, search
        self._trials = trial_count(search)
        study.sampler = self._sampler = JointSampler(search, seed, points)
        self._prepare, self._held, self._over = prepare, held, over
        self._live: dict[str, optuna.Trial] = {}  # those that run, by Tune's ids
        self._unfinished = unfinished(study)
        self._drawn = len(own_trials(study))
        self.at_once = math.inf

    @property
    def left(self) -> int:
        """Trials that run or are still to be drawn, none in a sweep that is held; called by another
        thread.
        """
        if self._held():
            return 0
        if self._over():
            return len(self._live)
        return len(self._live) + len(self._unfinished) + max(0, self._trials - self._drawn)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; `FINISHED` after the last one, None while none may begin."""
        if self._held() or len(self._live) >= self.at_once:
            return None
        while (drawn := self._next()) is not None:
            number, trial = drawn
            name = trial_name(number)
            try:
                self._sampler.suggest(trial)
                params = decode(self._search.space, trial.params)
                budget = self._prepare(name, params)
            except ConfigError as error:
                tell_failed(trial, str(error))
                continue
            self._live[trial_id] = trial
            return {"trial": name, "number": number, "params": params, "budget": budget}
        return str(Searcher.FINISHED)

    def _next(self) -> tuple[int, optuna.Trial] | None:
        """An unfinished trial of an earlier driver, else a new one, with its number; None: none.

        An unfinished trial is drawn to its end: its driver may have died between two values, and
        a value that is missing would silently be that of the config file.
        """
        if self._over():
            return None
        if self._unfinished:
            number = self._unfinished.pop(0)
            return number, live(self._study, number)
        if self._drawn >= self._trials:
            return None
        self._drawn += 1
        return self._drawn - 1, self._study.ask()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        report(self._live[trial_id], result, self.metric)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The end of a trial: with an outcome of its own, or because the scheduler stopped it.

        Errors are recorded by `ProgressCallback.on_trial_error`, which knows their cause.
        """
        trial = self._live.pop(trial_id, None)  # Tune calls again where this raises
        if trial is None or error or result is None or "interrupted" in result:
            return
        if "outcome" in result:
            tell_outcome(trial, result)
        else:
            report(trial, result, self.metric)
            tell_pruned(trial, result)

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the study is in its storage already."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing; see `save`."""
