"""What earlier sweeps found out, as trials that the sampler learns from. Imports no ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from raytune_ft.config.branches import branches, contains
from raytune_ft.config.environment import expand_text
from raytune_ft.config.load import load_config
from raytune_ft.config.reference import one_of
from raytune_ft.config.schema import Config
from raytune_ft.config.search import SearchConfig
from raytune_ft.errors import StorageError
from raytune_ft.rundir import CONFIG
from raytune_ft.search.first import written_values
from raytune_ft.search.space import decode, distributions, encode
from raytune_ft.search.storage import STUDY_FILE, open_storage

FROM = "from"


def earlier_trials(search: SearchConfig) -> list[FrozenTrial]:
    """The completed trials of the sweeps in `search.warm_start` that lie in the space.

    A line that an earlier sweep did not search has the value of its file. Each trial says where it
    is from.

    Raises:
        StorageError: a directory holds no sweep, or one of other metrics or other keys.
    """
    written = search.warm_start or []
    folders = [written] if isinstance(written, str) else written
    return [trial for folder in folders for trial in _of_sweep(Path(folder), search)]


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
    url = earlier.storage or f"sqlite:///{folder / STUDY_FILE}"
    if earlier.storage is None and not (folder / STUDY_FILE).is_file():
        raise StorageError(
            f"search.warm_start={folder}", f"holds no {STUDY_FILE}", "write a sweep's directory"
        )
    storage = open_storage(expand_text(url, "search.storage"))
    try:
        return optuna.load_study(study_name=config.name, storage=storage)
    except KeyError:
        raise StorageError(
            f"search.warm_start={folder}",
            f"has no study {config.name} in its storage",
            "write the directory of a sweep that began",
        ) from None


def _point(search: SearchConfig, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The values of every line that exists beside the others; None where one is outside of it."""
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
