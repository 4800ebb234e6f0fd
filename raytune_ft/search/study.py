"""The Optuna study of a sweep: opened, told how trials went, read as rows. Imports no ray."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from raytune_ft.config.search import SearchConfig
from raytune_ft.errors import StorageError
from raytune_ft.records import TrialRecord, TrialStatus
from raytune_ft.search.space import decode, trial_name

STUDY_FILE = "study.db"
FACTS = ("eval_loss", "examples", "wall_s")


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


def unfinished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were begun and not ended."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def report(study: optuna.Study, number: int, result: Mapping[str, Any], metric: str) -> None:
    """An intermediate value at so many examples; the untouched base is none."""
    value, examples = result.get(metric), result.get("examples", 0)
    if examples > 0 and isinstance(value, float) and math.isfinite(value):
        live(study, number).report(value, step=int(examples))


def tell_outcome(study: optuna.Study, number: int, result: Mapping[str, Any]) -> None:
    """A run that ended by itself: `outcome` is its status, `value` its best of the metric."""
    if result["outcome"] == "failed" or result.get("value") is None:
        set_attributes(study, number, facts(result))
        tell_failed(study, number, result.get("error") or "it ended without an evaluation")
        return
    set_attributes(study, number, {**facts(result), "status": result["outcome"]})
    study.tell(number, float(result["value"]))


def tell_failed(study: optuna.Study, number: int, error: str) -> None:
    """A trial that is no use to anybody, and why."""
    set_attributes(study, number, {"error": error})
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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
