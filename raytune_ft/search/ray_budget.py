"""What Tune is told when a sweep's budget is used up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray import tune

from raytune_ft.ray_backend.searcher import OfThisProcess
from raytune_ft.search.budget import Spending


class StopAtBudget(OfThisProcess, tune.Stopper, tune.Callback):
    """Stops a running trial at its next report once the budget is used up; `remember` keeps what
    was spent. That no new trial begins is the searcher's.
    """

    def __init__(self, spending: Spending, remember: Callable[[], None]) -> None:
        self._spending, self._remember = spending, remember
        self._names: dict[str, str] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial that reports is to stop; one that ends by itself does that anyway."""
        self._spending.trained(self._names[trial_id], int(result.get("examples", 0)))
        self._remember()
        return not result.get("done") and self._spending.over() is not None

    def stop_all(self) -> bool:
        """Never: trials end one by one, with what they have."""
        return False

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `Callback`."""
        self._names[trial.trial_id] = trial.config["trial"]
        self._spending.began(trial.config["trial"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `Callback`."""
        self._spending.ended(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `Callback`."""
        self._spending.ended(trial.config["trial"])
