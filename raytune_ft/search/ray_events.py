"""What Ray Tune is told while a sweep runs, and what it tells."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from ray import tune

from raytune_ft.config.search import SearchConfig
from raytune_ft.errors import RunFailed
from raytune_ft.ray_backend.searcher import OfThisProcess
from raytune_ft.search.progress import Progress
from raytune_ft.search.ray_places import Place
from raytune_ft.search.study import rows, tell_failed


class StopWith(OfThisProcess, tune.Stopper):
    """Ends the sweep when a signal has come: trials are told to leave, which ends their steps.

    Tune kills whoever is still there 10 s after it heard of the end. So it hears of it only when no
    trial holds a place any more, or when the grace for their checkpoints has passed.
    """

    def __init__(self, interrupted: threading.Event, place: Place, grace_s: float) -> None:
        self._interrupted, self._place, self._grace_s = interrupted, place, grace_s
        self._told_at: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped for what it reports."""
        return False

    def stop_all(self) -> bool:
        """Asked between events."""
        if not self._interrupted.is_set():
            return False
        if self._told_at is None:
            self._told_at = time.monotonic()
            self._place.stop_everybody()
        if time.monotonic() - self._told_at > self._grace_s:
            return True
        return not self._place.open_runs()


class Reports(OfThisProcess, tune.Callback):
    """From Tune to `progress`."""

    def __init__(
        self,
        progress: Progress,
        study: optuna.Study,
        search: SearchConfig,
        after_trial: Callable[[], None],
        place: Place,
    ) -> None:
        self._progress, self._study, self._search = progress, study, search
        self._after_trial, self._place = after_trial, place

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `Callback`."""
        self._progress.started(trial.config["trial"], trial.config["params"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See `Callback`."""
        if "eval_loss" in result:
            self._progress.reported(trial.config["trial"], result["examples"], result["eval_loss"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `Callback`."""
        self._finished(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process that drives the trial died, or has a bug; the study hears of it here.

        It ended nothing that it had started, and others wait for its place.
        """
        try:
            self._place.give_up(trial.config["trial"])
        except RunFailed as error:
            self._progress.note(f"{trial.config['trial']}: {error}")
        tell_failed(self._study, trial.config["number"], _last_line(trial.error_file))
        self._finished(trial)

    def _finished(self, trial: Any) -> None:
        name = trial.config["trial"]
        every = rows(self._study, self._search)
        row = next(row for row in every if row.id == name)
        if row.status != "interrupted":
            self._after_trial()
            self._progress.finished(name, row.status, row.eval_loss, row.error)


def _last_line(path: str | None) -> str:
    """The end of what Tune wrote down of an error: its type and its message."""
    text = Path(path).read_text(encoding="utf-8") if path else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"the trial's driver failed: {lines[-1] if lines else 'no reason known'}"[:300]
