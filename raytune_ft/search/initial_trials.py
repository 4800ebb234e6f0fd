"""The first points of a sweep, and trials of earlier sweeps to learn from. Does not import Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from raytune_ft.config.environment import expand_text
from raytune_ft.config.load import load_config
from raytune_ft.config.methods import METHODS
from raytune_ft.config.reference import one_of
from raytune_ft.config.schema import Config
from raytune_ft.config.search import SearchConfig
from raytune_ft.config.search_space import (
    METHOD,
    Point,
    allowed,
    branches,
    conditions,
    contains,
    trial_count,
)
from raytune_ft.errors import StorageError
from raytune_ft.layout import CONFIG, STUDY
from raytune_ft.search.space import decode, distributions, encode, open_storage, study_url

BASE_LR = 5e-5
REFERENCE_WIDTH = 2000
WIDTH_POWERS = {"llama": 0.781, "qwen": 0.0775}
LR = "train.lr"


def first_points(config: Config, family: str, width: int | None) -> list[Point]:
    """The points to try first: the values of the file, those of the file with `published_lr`, and
    `search.first`. With `search.defaults: false` only the last; under a grid none.

    A value outside the space is left out of its point, to be drawn. A point that breaks a
    constraint or repeats another is dropped. `family` and `width` are transformers' `model_type`
    and `hidden_size`; a few models have no `hidden_size`.
    """
    search = config.search
    assert search is not None
    if search.sampler == "grid":
        return []
    written = written_values(config, search)
    wanted: list[tuple[Point, Point]] = [(point, written) for point in search.first]
    if search.defaults:
        wanted.insert(0, ({}, written))
        method = str(written.get(METHOD, config.method.name))
        line = search.space.get(LR)
        known = METHODS[method].lr_factor is not None
        prior = published_lr(method, family, width) if width and known else None
        if line is not None and contains(line, prior):
            wanted.append(({LR: prior}, written))
    points: list[Point] = []
    for given, rest in wanted:
        point = _filled(search, given, rest)
        if point and point not in points and allowed(point, conditions(search)):
            points.append(point)
    return points[: trial_count(search)]


def published_lr(method: str, family: str, width: int) -> float:
    """5e-5 for every weight and ten times that for LoRA, times (2000 / width) ^ power.

    From "LoRA Without Regret" (Schulman et al., Thinking Machines, 2025) and the `get_lr` of its
    tinker-cookbook: the power is 0.781 for Llama and 0.0775 for Qwen; for others, where none was
    published, the rate is not scaled. Fitted at widths from 2048 to 8192; the cookbook has replaced
    it by a table of measured rates since, which lie between 1e-4 and 1e-3. It is a first guess.
    """
    power = next((each for name, each in WIDTH_POWERS.items() if family.startswith(name)), 0.0)
    factor = METHODS[method].lr_factor or 1.0
    return BASE_LR * factor * float((REFERENCE_WIDTH / width) ** power)


def written_values(config: Config, search: SearchConfig) -> Point:
    """The file's values for the lines of the space that contain them."""
    plain: dict[str, Any] = config.model_dump()
    found: Point = {}
    for key, line in search.space.items():
        here: Any = plain
        for part in key.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        if contains(line, here):
            found[key] = here
    return found


def _filled(search: SearchConfig, given: Point, rest: Mapping[str, Any]) -> Point:
    """`given` with the values of `rest` that exist beside it, unless that breaks a constraint."""
    tree = branches(search.space)
    wanted: Point = {}
    for key, value in given.items():
        wanted |= tree.with_needs(key, value)
    wanted |= given
    point: Point = {}
    for key in tree.order:
        if key in wanted:
            point[key] = wanted[key]
        elif key in rest and tree.exists(key, point):
            point[key] = rest[key]
    return point if allowed(point, conditions(search)) else wanted


FROM = "from"


def earlier_trials(search: SearchConfig) -> list[FrozenTrial]:
    """The completed trials of the sweeps in `search.warm_start` that lie in the space.

    A line that an earlier sweep did not search has the value of that sweep's file. The attribute
    `from` of a trial names its sweep and number.

    Raises:
        StorageError: a directory holds no sweep, or a sweep of other metrics or other keys.
    """
    written = search.warm_start or []
    folders = [written] if isinstance(written, str) else written
    found = (Path(expand_text(folder, "search.warm_start")) for folder in folders)
    return [trial for folder in found for trial in _of_sweep(folder, search)]


def _of_sweep(folder: Path, search: SearchConfig) -> list[FrozenTrial]:
    where = f"search.warm_start={folder}"
    if not (folder / CONFIG).is_file():
        raise StorageError(where, f"holds no {CONFIG} of a sweep", "write a sweep's directory")
    config = load_config(folder / CONFIG)
    earlier = config.search
    if earlier is None:
        raise StorageError(where, "is a run, not a sweep", "write a sweep's directory")
    if earlier.metrics != search.metrics:
        raise StorageError(
            where,
            f"was judged by {', '.join(earlier.metrics)}",
            f"write search.metric: {one_of(earlier.metrics)}, or leave it out",
        )
    if not earlier.space.keys() & search.space.keys():
        raise StorageError(
            where,
            f"searched over {', '.join(earlier.space)}, and this sweep over none of them",
            "leave it out",
        )
    found = []
    for trial in _study(folder, config, earlier).get_trials(
        deepcopy=False, states=(TrialState.COMPLETE,)
    ):
        if FROM in trial.user_attrs:
            continue
        values = written_values(config, search) | decode(earlier.space, trial.params)
        point = _point(search, values)
        if point is not None:
            origin = f"{folder}#{trial.number}"
            found.append(_borrowed(search, point, trial.values, origin))
    return found


def _study(folder: Path, config: Config, earlier: SearchConfig) -> optuna.Study:
    if earlier.storage is None and not (folder / STUDY).is_file():
        raise StorageError(
            f"search.warm_start={folder}", f"holds no {STUDY}", "write a sweep's directory"
        )
    storage = open_storage(study_url(earlier, folder))
    try:
        return optuna.load_study(study_name=config.name, storage=storage)
    except KeyError:
        raise StorageError(
            f"search.warm_start={folder}",
            f"has no study {config.name} in its storage",
            "write the directory of a sweep that began",
        ) from None


def _point(search: SearchConfig, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The value of every line that exists beside the others; None if one is outside its line."""
    tree = branches(search.space)
    point: dict[str, Any] = {}
    for key in tree.order:
        if tree.exists(key, point):
            if not contains(search.space[key], values.get(key)):
                return None
            point[key] = values[key]
    return point


def _borrowed(
    search: SearchConfig, point: dict[str, Any], values: list[float], origin: str
) -> FrozenTrial:
    every = distributions(search.space)
    return create_trial(
        values=values,
        params=encode(search.space, point),
        distributions={key: every[key] for key in point},
        user_attrs={FROM: origin},
    )
