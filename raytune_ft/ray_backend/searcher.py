"""Optuna behind Ray Tune: which trial comes next, and what Optuna is told of it.

Ray's own OptunaSearch tells Optuna that a trial stopped by ASHA is complete, leaves one with a
NaN running for ever, and merges sweeps that share a storage; so this asks and tells by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from raytune_ft.config.search import SearchConfig
from raytune_ft.config.search_space import Point, trial_count
from raytune_ft.errors import ConfigError
from raytune_ft.search.results import trial_name
from raytune_ft.search.sampler import JointSampler
from raytune_ft.search.space import decode
from raytune_ft.search.study import (
    facts,
    live,
    own_trials,
    report,
    set_attributes,
    tell_failed,
    tell_outcome,
    unfinished,
)

Prepare = Callable[[str, dict[str, Any]], int]


class OfThisProcess:
    """Tune copies and pickles what it is given, for a restore that we do not use.

    A copy is the thing itself, and a pickle of it is nothing at all.
    """

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class StudySearcher(OfThisProcess, Searcher):
    """Hands out trials: first the ones that an earlier driver left unfinished, then new ones.

    `prepare` makes a trial's directory and says how many examples it will see; a ConfigError of
    it fails that trial, and the next one is drawn. Nothing is drawn while `held` is true, and
    nothing any more once `over` is.
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
        self._numbers: dict[str, int] = {}  # by Tune's id of the trial
        self._unfinished = unfinished(study)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; `FINISHED` after the last one, None for nothing at the moment."""
        if self._held():
            return None
        while (number := self._next()) is not None:
            trial, name = live(self._study, number), trial_name(number)
            try:
                self._sampler.suggest(trial)
                params = decode(self._search.space, trial.params)
                budget = self._prepare(name, params)
            except ConfigError as error:
                tell_failed(self._study, number, str(error))
                continue
            self._numbers[trial_id] = number
            return {"trial": name, "number": number, "params": params, "budget": budget}
        return str(Searcher.FINISHED)

    def _next(self) -> int | None:
        """An earlier driver's trial: it may have died while it drew, and a trial without a value
        would run with that of the config file. Else a new one.
        """
        if self._over():
            return None
        if self._unfinished:
            return self._unfinished.pop(0)
        number = len(own_trials(self._study))
        if number >= self._trials:
            return None
        self._study.ask()
        return number

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """An evaluation on the way."""
        report(self._study, self._numbers[trial_id], result, self.metric)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The end of a trial: by itself, with an outcome, or because the scheduler stopped it.

        Of an error, the callback that sees its cause tells the study.
        """
        number = self._numbers[trial_id]
        if error or result is None:
            return
        if "interrupted" in result:
            return
        if "outcome" in result:
            tell_outcome(self._study, number, result)
        else:
            report(self._study, number, result, self.metric)
            trial = live(self._study, number)
            set_attributes(trial, facts(result))
            self._study.tell(trial, state=TrialState.PRUNED)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is in its storage already."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing; see `save`."""
