"""The Optuna study of a sweep: opened, told how trials went, read as rows. Imports no ray."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

from raytune_ft.config.explain import shown_value
from raytune_ft.config.search import SearchConfig
from raytune_ft.errors import StorageError
from raytune_ft.records import TrialRecord, TrialStatus
from raytune_ft.rundir import TRIALS
from raytune_ft.search.space import decode, trial_name

STUDY_FILE = "study.db"
SEARCH, REPORTS = "search", "reports"
CONNECT_TIMEOUT_S = 8
MAX_REASON = 200
SERVERS = ("postgresql", "mysql", "mariadb")
DRIVERS = {"postgresql": "postgresql+psycopg"}  # the driver that the `postgres` extra installs
FACTS = ("eval_loss", "examples", "wall_s")


def open_study(name: str, sweep_dir: Path, search: SearchConfig, resume: bool) -> optuna.Study:
    """The study of one sweep: a file of its own, or a name of its own in a shared storage.

    Raises:
        StorageError: the storage cannot be opened, holds a study of that name already, or another
            one than the sweep began with.
    """
    url = search.storage or f"sqlite:///{sweep_dir / STUDY_FILE}"
    try:
        study = optuna.create_study(
            study_name=name,
            storage=open_storage(url),
            directions=["minimize" if mode == "min" else "maximize" for mode in search.modes],
            load_if_exists=resume or search.storage is None,
        )
    except DuplicatedStudyError:
        raise StorageError(
            f"study {name}",
            "exists in search.storage, and sweeps are not merged",
            "write another name, or --resume to continue that sweep",
        ) from None
    _check_same(study, search, sweep_dir)
    return study


def open_storage(url: str) -> BaseStorage:
    """What Optuna calls a storage, made where there is none yet.

    Raises:
        StorageError: no such URL, no driver, or nobody answers there within `CONNECT_TIMEOUT_S`.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    scheme, _, rest = url.partition("://")
    try:
        if scheme.split("+")[0] not in SERVERS:
            return optuna.storages.get_storage(url)
        return optuna.storages.RDBStorage(
            f"{DRIVERS.get(scheme, scheme)}://{rest}",
            engine_kwargs={
                "connect_args": {"connect_timeout": CONNECT_TIMEOUT_S},
                "pool_pre_ping": True,  # a connection that lay idle for one long trial may be gone
            },
        )
    except (ImportError, OSError, ValueError, SQLAlchemyError, StorageInternalError) as error:
        raise StorageError(
            f"search.storage={shown_value(url)}",
            f"cannot be opened ({_reason(error)})",
            "install its driver, for PostgreSQL with pip install 'raytune-ft[postgres]'"
            if isinstance(error, ImportError | NoSuchModuleError)
            else "write an Optuna URL that answers here",
        ) from error


def _check_same(study: optuna.Study, search: SearchConfig, sweep_dir: Path) -> None:
    """The study is the one that the sweep began with, and says what its trials were drawn from."""
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


def unfinished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were begun and not ended."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def report(study: optuna.Study, number: int, result: Mapping[str, Any], metric: str) -> None:
    """An intermediate value at so many examples; the untouched base is none."""
    value, examples = result.get(metric), result.get("examples", 0)
    if not (examples > 0 and isinstance(value, float) and math.isfinite(value)):
        return
    trial = live(study, number)
    if len(study.directions) == 1:
        trial.report(value, step=int(examples))
    else:  # which Optuna does not take where there are several metrics
        trial.set_user_attr(REPORTS, {**trial.user_attrs.get(REPORTS, {}), str(examples): value})


def reports(trial: FrozenTrial) -> dict[int, float]:
    """Its evaluations by the first metric, by the examples seen."""
    kept = trial.user_attrs.get(REPORTS, {})
    return {int(examples): value for examples, value in kept.items()} or trial.intermediate_values


def pareto(study: optuna.Study) -> tuple[str, ...] | None:
    """The trials that no other one beats in every metric; None where there is one metric."""
    if len(study.directions) == 1:
        return None
    return tuple(sorted(trial_name(trial.number) for trial in study.best_trials))


def tell_outcome(study: optuna.Study, number: int, result: Mapping[str, Any]) -> None:
    """A run that ended by itself: `outcome` is its status, `values` its metrics at its best."""
    if result["outcome"] == "failed" or result.get("values") is None:
        set_attributes(study, number, facts(result))
        tell_failed(study, number, result.get("error") or "it ended without an evaluation")
        return
    set_attributes(study, number, {**facts(result), "status": result["outcome"]})
    study.tell(number, [float(value) for value in result["values"]])


def tell_failed(study: optuna.Study, number: int, error: str) -> None:
    """A trial that is no use to anybody, and why."""
    set_attributes(study, number, {"error": error})
    study.tell(number, state=TrialState.FAIL)


def rows(study: optuna.Study, search: SearchConfig) -> list[TrialRecord]:
    """What the study knows of every trial; of a pruned one, what was known when it was stopped."""
    return [_row(trial, search) for trial in study.get_trials(deepcopy=False)]


def _row(trial: FrozenTrial, search: SearchConfig) -> TrialRecord:
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
        id=trial_name(trial.number),
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
    known = {name: result.get(f"best_{name}", result.get(name)) for name in FACTS}
    return {name: value for name, value in known.items() if value is not None}


def set_attributes(study: optuna.Study, number: int, values: Mapping[str, Any]) -> None:
    trial = live(study, number)
    for name, value in values.items():
        trial.set_user_attr(name, value)


def live(study: optuna.Study, number: int) -> optuna.Trial:
    """The trial as one that may still be written to, whoever began it."""
    return optuna.Trial(study, study.trials[number]._trial_id)


def _reason(error: BaseException) -> str:
    """The first line of it; drivers go on with hints and links."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:MAX_REASON]
