"""Optuna behind Ray Tune: which trial comes next, and what Optuna is told of it.

Ray's own OptunaSearch tells Optuna that a trial stopped by ASHA is complete, leaves one with a
NaN running for ever, and merges sweeps that share a storage; so this asks and tells by itself.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from sqlalchemy.exc import SQLAlchemyError

from raytune_ft.config.search import SearchConfig
from raytune_ft.errors import ConfigError, StorageError
from raytune_ft.records import TrialRecord, TrialStatus
from raytune_ft.search.space import decode, distributions, trial_name

STUDY_FILE = "study.db"
FACTS = ("eval_loss", "examples", "wall_s")
MIN_RANDOM_TRIALS, MAX_RANDOM_TRIALS = 4, 10
Prepare = Callable[[str, dict[str, Any]], int]


def open_study(
    name: str, sweep_dir: Path, storage: str | None, mode: str, resume: bool
) -> optuna.Study:
    """The study of one sweep: a file of its own, or a name of its own in a shared storage.

    Raises:
        StorageError: the storage cannot be opened, or holds a study of that name already.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    url = storage or f"sqlite:///{sweep_dir / STUDY_FILE}"
    try:
        return optuna.create_study(
            study_name=name,
            storage=url,
            direction="minimize" if mode == "min" else "maximize",
            load_if_exists=resume or storage is None,
        )
    except DuplicatedStudyError:
        raise StorageError(
            f"study {name}",
            "exists in search.storage, and sweeps are not merged",
            "write another name, or --resume to continue that sweep",
        ) from None
    except (ImportError, OSError, ValueError, SQLAlchemyError, StorageInternalError) as error:
        raise StorageError(
            "search.storage", f"cannot be opened ({_first_line(error)})", "write an Optuna URL"
        ) from error


def sampler_for(name: str, seed: int, number: int, trials: int) -> BaseSampler:
    """The sampler of one trial, a function of the sweep's seed and the trial's number.

    A sampler that lives as long as the process would draw the first trials again after a resume.
    """
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    if name == "random":
        return RandomSampler(seed=own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(
            seed=own,
            n_startup_trials=max(MIN_RANDOM_TRIALS, min(MAX_RANDOM_TRIALS, trials // 3)),
            multivariate=True,
            constant_liar=True,  # keeps trials that run at the same time apart
        )


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
    it fails that trial, and the next one is drawn. Nothing is drawn while `held` is true.
    """

    def __init__(
        self,
        study: optuna.Study,
        search: SearchConfig,
        seed: int,
        prepare: Prepare,
        held: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(metric=search.metric, mode=search.mode)
        self._study, self._search, self._seed = study, search, seed
        self._distributions: dict[str, BaseDistribution] = distributions(search.space)
        self._prepare, self._held = prepare, held
        self._numbers: dict[str, int] = {}  # by Tune's id of the trial
        self._unfinished = [trial.number for trial in unfinished(study)]
        for number in self._unfinished:
            self._draw_the_rest(number)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; `FINISHED` after the last one, None for nothing at the moment."""
        if self._held():
            return None
        while (number := self._next_number()) is not None:
            params = decode(self._search.space, self._study.trials[number].params)
            try:
                budget = self._prepare(trial_name(number), params)
            except ConfigError as error:
                tell_failed(self._study, number, str(error))
                continue
            self._numbers[trial_id] = number
            name = trial_name(number)
            return {"trial": name, "number": number, "params": params, "budget": budget}
        return str(Searcher.FINISHED)

    def _next_number(self) -> int | None:
        if self._unfinished:
            return self._unfinished.pop(0)
        number = len(self._study.trials)
        if number >= self._search.trials:
            return None
        self._sample_for(number)
        return self._study.ask(self._distributions).number

    def _draw_the_rest(self, number: int) -> None:
        """A driver may die while it draws: Optuna stores a trial, and then its values singly.

        What lacks is drawn as it would have been; a trial without it would run with the values of
        the config file.
        """
        if self._distributions.keys() <= self._study.trials[number].params.keys():
            return
        self._sample_for(number)
        trial = _live(self._study, number)
        for name, distribution in self._distributions.items():
            trial._suggest(name, distribution)

    def _sample_for(self, number: int) -> None:
        self._study.sampler = sampler_for(
            self._search.sampler, self._seed, number, self._search.trials
        )

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
            _set_attributes(self._study, number, _facts(result))
            self._study.tell(number, state=TrialState.PRUNED)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is in its storage already."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing; see `save`."""


def unfinished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were begun and not ended."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def report(study: optuna.Study, number: int, result: Mapping[str, Any], metric: str) -> None:
    """An intermediate value at so many examples; the untouched base is none."""
    value, examples = result.get(metric), result.get("examples", 0)
    if examples > 0 and isinstance(value, float) and math.isfinite(value):
        _live(study, number).report(value, step=int(examples))


def tell_outcome(study: optuna.Study, number: int, result: Mapping[str, Any]) -> None:
    """A run that ended by itself: `outcome` is its status, `value` its best of the metric."""
    if result["outcome"] == "failed" or result.get("value") is None:
        _set_attributes(study, number, _facts(result))
        tell_failed(study, number, result.get("error") or "it ended without an evaluation")
        return
    _set_attributes(study, number, {**_facts(result), "status": result["outcome"]})
    study.tell(number, float(result["value"]))


def tell_failed(study: optuna.Study, number: int, error: str) -> None:
    """A trial that is no use to anybody, and why."""
    _set_attributes(study, number, {"error": error})
    study.tell(number, state=TrialState.FAIL)


def rows(study: optuna.Study, search: SearchConfig) -> list[TrialRecord]:
    """What the study knows of every trial; of a pruned one, what was known when it was stopped."""
    return [_row(trial, search) for trial in study.get_trials(deepcopy=False)]


def _row(trial: FrozenTrial, search: SearchConfig) -> TrialRecord:
    known = trial.user_attrs
    values = trial.intermediate_values
    value = (max if search.mode == "max" else min)(values.values(), default=None)
    eval_loss = value if search.metric == "eval_loss" else known.get("eval_loss")
    status: TrialStatus = "interrupted"
    if trial.state == TrialState.COMPLETE:
        status, value, eval_loss = known["status"], trial.value, known["eval_loss"]
    elif trial.state == TrialState.PRUNED:
        status = "pruned"
    elif trial.state == TrialState.FAIL:
        status, value, eval_loss = "failed", None, None
    return TrialRecord(
        id=trial_name(trial.number),
        params=decode(search.space, trial.params),
        status=status,
        eval_loss=eval_loss,
        examples=known.get("examples", max(values, default=0)),
        wall_s=known.get("wall_s", 0.0),
        error=known.get("error"),
        value=value,
    )


def _facts(result: Mapping[str, Any]) -> dict[str, Any]:
    facts = {name: result.get(f"best_{name}", result.get(name)) for name in FACTS}
    return {name: value for name, value in facts.items() if value is not None}


def _set_attributes(study: optuna.Study, number: int, values: Mapping[str, Any]) -> None:
    live = _live(study, number)
    for name, value in values.items():
        live.set_user_attr(name, value)


def _live(study: optuna.Study, number: int) -> optuna.Trial:
    """The trial as one that may still be written to, whoever began it."""
    return optuna.Trial(study, study.trials[number]._trial_id)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
