"""The Optuna study of a sweep: open it, record trials, read them as rows. Does not import Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from raytune_ft.config.search import SearchConfig
from raytune_ft.errors import StorageError
from raytune_ft.layout import TRIALS
from raytune_ft.records import TrialRecord, TrialStatus
from raytune_ft.search.initial_trials import FROM, earlier_trials
from raytune_ft.search.results import trial_name
from raytune_ft.search.space import decode, open_storage, study_url

SEARCH, REPORTS = "search", "reports"
FACTS = ("eval_loss", "examples", "wall_s")


def open_study(name: str, sweep_dir: Path, search: SearchConfig, resume: bool) -> optuna.Study:
    """The study of one sweep: a separate file, or a separate name in a shared storage.

    Raises:
        StorageError: the storage cannot be opened, holds a study of that name with trials already,
            or another one than the sweep began with.
    """
    study = optuna.create_study(
        study_name=name,
        storage=open_storage(study_url(search, sweep_dir)),
        directions=["minimize" if mode == "min" else "maximize" for mode in search.modes],
        load_if_exists=True,
    )
    if search.storage is not None and not resume and own_trials(study):
        raise StorageError(
            f"study {name}",
            "exists in search.storage, and sweeps are not merged",
            "write another name, or --resume to continue that sweep",
        )
    _check_same(study, search, sweep_dir)
    return study


def _check_same(study: optuna.Study, search: SearchConfig, sweep_dir: Path) -> None:
    """Check that the study is the sweep's, and record the space that its trials are drawn from."""
    plain = search.model_dump(mode="json", exclude_none=True)
    now = {"space": plain["space"], "metric": search.metrics, "mode": search.modes}
    saved = study.user_attrs.get(SEARCH)
    if saved is None:
        if (sweep_dir / TRIALS).is_dir():
            raise StorageError(
                f"study {study.study_name}",
                f"is not in search.storage, and {sweep_dir / TRIALS} holds its trials",
                "write the storage that the sweep began with",
            )
        known = {trial.user_attrs.get(FROM) for trial in study.get_trials(deepcopy=False)}
        for trial in earlier_trials(search):
            if trial.user_attrs[FROM] not in known:  # a driver may have died between two of them
                study.add_trial(trial)
        study.set_user_attr(SEARCH, now)
    elif saved != now:
        differing = [key for key in now if key != "space" and saved[key] != now[key]]
        lines = {**saved["space"], **now["space"]}
        differing += [
            f"space.{key}" for key in lines if saved["space"].get(key) != now["space"].get(key)
        ]
        raise StorageError(
            f"study {study.study_name}",
            f"was begun with another {', '.join(f'search.{key}' for key in differing)}",
            "write the storage that the sweep began with, or another name",
        )


def own_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The sweep's trials by number, without those of earlier sweeps, which come first."""
    return [each for each in study.get_trials(deepcopy=False) if FROM not in each.user_attrs]


def unfinished(study: optuna.Study) -> list[int]:
    """Numbers of trials that have started and not ended."""
    every = enumerate(own_trials(study))
    return [number for number, trial in every if trial.state == TrialState.RUNNING]


def report(trial: optuna.Trial, result: Mapping[str, Any], metric: str) -> None:
    """Record the metric of one evaluation, by examples seen; except that of the base."""
    value, examples = result.get(metric), result.get("examples", 0)
    if not (examples > 0 and isinstance(value, float) and math.isfinite(value)):
        return
    if len(trial.study.directions) == 1:
        trial.report(value, step=int(examples))
    else:  # Optuna takes no intermediate values with several metrics
        trial.set_user_attr(REPORTS, {**trial.user_attrs.get(REPORTS, {}), str(examples): value})


def reports(trial: FrozenTrial) -> dict[int, float]:
    """Examples seen -> the first metric, for each evaluation of the trial."""
    kept = trial.user_attrs.get(REPORTS, {})
    return {int(examples): value for examples, value in kept.items()} or trial.intermediate_values


def pareto(study: optuna.Study) -> tuple[str, ...] | None:
    """The trials that no other one beats in every metric; None if there is one metric."""
    if len(study.directions) == 1:
        return None
    signs = [1 if each == StudyDirection.MINIMIZE else -1 for each in study.directions]
    points = {
        trial_name(number): [s * value for s, value in zip(signs, trial.values, strict=True)]
        for number, trial in enumerate(own_trials(study))
        if trial.state == TrialState.COMPLETE
    }
    return tuple(
        name
        for name, point in points.items()
        if not any(
            other != point and all(a <= b for a, b in zip(other, point, strict=True))
            for other in points.values()
        )
    )


def tell_outcome(trial: optuna.Trial, result: Mapping[str, Any]) -> None:
    """Record a run that ended by itself: `outcome` is its status, `values` its best metrics."""
    set_attributes(trial, facts(result))
    if result["outcome"] == "failed" or result.get("values") is None:
        tell_failed(trial, result.get("error") or "it ended without an evaluation")
        return
    trial.set_user_attr("status", result["outcome"])
    trial.study.tell(trial, [float(value) for value in result["values"]])


def tell_pruned(trial: optuna.Trial, result: Mapping[str, Any]) -> None:
    """Record a trial that the scheduler or the budget stopped."""
    set_attributes(trial, facts(result))
    trial.study.tell(trial, state=TrialState.PRUNED)


def tell_failed(trial: optuna.Trial, error: str) -> None:
    """Record a failed trial and its error."""
    trial.set_user_attr("error", error)
    trial.study.tell(trial, state=TrialState.FAIL)


def rows(study: optuna.Study, search: SearchConfig) -> list[TrialRecord]:
    """One row for every trial; for a pruned one, as it was when it was stopped."""
    return [_row(number, trial, search) for number, trial in enumerate(own_trials(study))]


def _row(number: int, trial: FrozenTrial, search: SearchConfig) -> TrialRecord:
    known = trial.user_attrs
    seen, metrics, values = reports(trial), search.metrics, None
    value = (max if search.modes[0] == "max" else min)(seen.values(), default=None)
    eval_loss = value if metrics[0] == "eval_loss" else known.get("eval_loss")
    status: TrialStatus = "interrupted"
    if trial.state == TrialState.COMPLETE:
        status, value, eval_loss = known["status"], trial.values[0], known["eval_loss"]
        values = dict(zip(metrics, trial.values, strict=True)) if len(metrics) > 1 else None
    elif trial.state == TrialState.PRUNED:
        status = "pruned"
    elif trial.state == TrialState.FAIL:
        status, value, eval_loss = "failed", None, None
    return TrialRecord(
        id=trial_name(number),
        params=decode(search.space, trial.params),
        status=status,
        eval_loss=eval_loss,
        examples=known.get("examples", max(seen, default=0)),
        wall_s=known.get("wall_s", 0.0),
        error=known.get("error"),
        value=value,
        values=values,
    )


def facts(result: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a trial's row that a message contains."""
    known = {name: result.get(f"best_{name}", result.get(name)) for name in FACTS}
    return {name: value for name, value in known.items() if value is not None}


def set_attributes(trial: optuna.Trial, values: Mapping[str, Any]) -> None:
    """Store attributes with the trial."""
    for name, value in values.items():
        trial.set_user_attr(name, value)


def live(study: optuna.Study, number: int) -> optuna.Trial:
    """The trial with this number, which can be written to. Another driver may have started it."""
    return optuna.Trial(study, own_trials(study)[number]._trial_id)
