"""Draw all values of a trial at once, with branches, constraints and given values.

Does not import Ray.
"""

from __future__ import annotations

import random
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from raytune_ft.config.search import SearchConfig
from raytune_ft.config.search_space import (
    allowed,
    branches,
    conditions,
    grid,
    trial_count,
    uniform_point,
    unmet,
)
from raytune_ft.search.space import decode, distributions, encode
from raytune_ft.search.study import own_trials

MIN_RANDOM_TRIALS, MAX_RANDOM_TRIALS = 4, 10
MAX_SAMPLED, MAX_UNIFORM = 20, 100_000


class ReplayedCmaEs(CmaEsSampler):
    """CMA-ES whose state is computed anew from the trials that have ended.

    Optuna's own keeps it as a pickle in the study, and whoever writes the study's file or database
    would run code here with it.
    """

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> None:
        """Keeps the trials of each generation, in the order in which they ended."""
        self._generations = defaultdict[Any, list[Any]](list)
        ended: list[Any] = sorted(completed_trials, key=lambda t: (t.datetime_complete, t.number))
        for each in ended:
            self._generations[each.system_attrs.get(self._attr_key_generation)].append(each)

    def _init_optimizer(self, trans: Any, direction: StudyDirection) -> Any:
        optimizer = super()._init_optimizer(trans, direction)
        size, sign = optimizer.population_size, 1 if direction == StudyDirection.MINIMIZE else -1
        while len(drawn := self._generations[optimizer.generation]) >= size:
            told = [(trans.transform(each.params), sign * each.value) for each in drawn[:size]]
            optimizer.tell(told)
        return optimizer


class JointSampler(BaseSampler):
    """Draws all values of a trial before one of them is stored, by the sampler of the config.

    The draw depends on the sweep's seed, the trial's number and the trials before it, and on no
    state of the process, so a resume does not draw the first trials again. Values that a trial
    already has, because its driver died while storing them, are kept. A draw that repeats a trial
    is drawn again, since the same seed would train the same weights. `points` are the first trials.
    """

    def __init__(
        self, search: SearchConfig, seed: int, points: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._search, self._seed = search, seed
        self._distributions = distributions(search.space)
        self._tree, self._constraints = branches(search.space), conditions(search)
        self._trials = trial_count(search)
        self._points = points
        if search.sampler == "grid":
            self._points = grid(search)
            random.Random(seed).shuffle(self._points)

    def suggest(self, trial: optuna.Trial) -> None:
        """Give a new trial, or one whose driver died, all its values.

        Raises:
            ConfigError: no draw met the constraints.
        """
        values: dict[str, Any] = {}
        for key in self._tree.order:
            if self._tree.exists(key, values):
                stored = trial._suggest(key, self._distributions[key])
                values |= decode(self._search.space, {key: stored})

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        known, own = decode(self._search.space, trial.params), own_trials(study)
        number = [each.number for each in own].index(trial.number)
        if number < len(self._points):
            known = {**self._points[number], **known}
        others = [other.params for other in own if other.number != trial.number]
        repeated = None
        for attempt in range(MAX_SAMPLED):
            point = self._draw(study, trial, known, self._sampler(number, attempt))
            if allowed(point, self._constraints):
                repeated = encode(self._search.space, point)
                if repeated not in others:
                    return repeated
        if repeated is not None:
            return repeated
        rng = random.Random(f"{self._seed} {number}")
        for _ in range(MAX_UNIFORM):
            point = uniform_point(self._search.space, self._tree, rng, known)
            if allowed(point, self._constraints):
                return encode(self._search.space, point)
        raise unmet(self._search, f"{MAX_UNIFORM:,} draws")

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        raise AssertionError(f"{param_name} was not drawn with the rest")

    def _draw(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        known: Mapping[str, Any],
        sampler: BaseSampler,
    ) -> dict[str, Any]:
        together = sampler.infer_relative_search_space(study, trial)
        joint = sampler.sample_relative(study, trial, together)
        point: dict[str, Any] = {}
        for key in self._tree.order:
            line, distribution = self._search.space[key], self._distributions[key]
            if not self._tree.exists(key, point):
                continue
            if key in known:
                point[key] = known[key]
            elif len(line.values) == 1:
                point[key] = line.values[0]
            else:
                drawn = (
                    joint[key]
                    if key in joint
                    else sampler.sample_independent(study, trial, key, distribution)
                )
                point |= decode(self._search.space, {key: drawn})
        return point

    def _sampler(self, number: int, attempt: int) -> BaseSampler:
        entropy = [self._seed, number, attempt] if attempt else [self._seed, number]
        own = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        startup = max(MIN_RANDOM_TRIALS, min(MAX_RANDOM_TRIALS, self._trials // 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            match self._search.sampler:
                case "tpe":
                    return TPESampler(
                        seed=own,
                        n_startup_trials=startup,
                        multivariate=True,
                        group=any(self._tree.needs.values()),
                        constant_liar=True,  # keeps trials that run at the same time apart
                    )
                case "gp":
                    return GPSampler(seed=own, n_startup_trials=startup)
                case "cmaes":
                    return ReplayedCmaEs(seed=own)
                case "random" | "grid":
                    return RandomSampler(seed=own)
