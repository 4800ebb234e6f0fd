"""A sweep: Ray Tune drives the trials, Optuna draws them, ASHA stops them, files remember them."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.error import TuneError
from ray.tune.stopper import CombinedStopper

from raytune_ft.config.execution import choose_execution
from raytune_ft.config.load import dump_yaml, load_config
from raytune_ft.config.schema import Config
from raytune_ft.config.search import SearchConfig
from raytune_ft.config.search_space import Point, trial_count
from raytune_ft.data.order import pass_length
from raytune_ft.data.prepare import open_prepared
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import Interrupted, RunFailed
from raytune_ft.estimate.memory import steps_in_a_pass
from raytune_ft.files import write_json_atomic, write_text_atomic
from raytune_ft.layout import CONFIG, RESULT, TRIALS
from raytune_ft.model.load import load_model_config
from raytune_ft.ray_backend.cluster import (
    connected,
    require_capacity,
    stop_grace_s,
    train_environment,
)
from raytune_ft.ray_backend.schedulers import Asha, Median, scheduler_for
from raytune_ft.ray_backend.searcher import OfThisProcess, StudySearcher
from raytune_ft.ray_backend.trial import (
    Place,
    Shared,
    SweepTrial,
    driver_place,
    engines,
    groups,
    outcome_of,
    spec_of,
)
from raytune_ft.records import RunResult, TrialRecord
from raytune_ft.search.initial_trials import first_points
from raytune_ft.search.progress import Progress, progress_for
from raytune_ft.search.results import Spending, SweepResult, apply_params, sweep_result, trial_name
from raytune_ft.search.slots import arrange
from raytune_ft.search.study import (
    open_study,
    own_trials,
    pareto,
    reports,
    rows,
    tell_failed,
    tell_outcome,
    unfinished,
)
from raytune_ft.train.optim import total_examples
from raytune_ft.train.result import load_result, write_ended
from raytune_ft.train.watchdog import interruptible

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard beside our own files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it catches SIGINT alone; `interruptible` catches both
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the outcome of a failed trial has no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # one line of it is in the trial's row
    "RAY_AIR_NEW_OUTPUT": "0",  # together with verbose=0: no output of Tune's own
}


@contextmanager
def tune_storage() -> Iterator[str]:
    """Tune's own notes, pickles among them: nothing is ever read from them again."""
    path = tempfile.mkdtemp(prefix="raytune-ft-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def settings_of_tune() -> Iterator[None]:
    """Tune reads its settings from the environment."""
    before = {name: os.environ.get(name) for name in TUNE_SETTINGS}
    os.environ.update(TUNE_SETTINGS)
    level = logging.getLogger("ray.tune").level
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.getLogger("ray.tune").setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


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


MAKESPAN, GPU_SECONDS = "makespan_s", "gpu_s"


def run_sweep(
    config: Config,
    sweep_dir: Path,
    data_dir: Path,
    tell: Callable[[str], None],
    resume: bool = False,
) -> SweepResult:
    """Run the trials of `config.search`; leave `study.db`, `trials/` and `result.json`.

    Args:
        config: resolved, `${ENV_NAME}` expanded.
        sweep_dir: exists, locked by the caller; `config.yaml` in it is what trials inherit, so
            that a secret is saved as it was written.
        data_dir: where `PreparedData` lies, on every node.
        tell: gets lines where there is no terminal.
        resume: keep the trials that have ended, continue the others, draw the rest.

    Raises:
        ClusterError: the cluster cannot hold one trial.
        StorageError: the study cannot be opened or is another sweep's.
        RunFailed: no trial is usable; `result.json` says so too.
        Interrupted: SIGINT or SIGTERM; likewise, and the sweep can be resumed.
    """
    assert config.search is not None
    stop_grace_s()  # refused now if it is to be refused
    with connected(), interruptible() as interrupted:
        sweep = _Sweep(config, sweep_dir, data_dir, resume)
        sweep.run(tell, interrupted)
        result = sweep.write_result(interrupted.is_set())
    if result.status == "interrupted":
        raise Interrupted(f"{sweep_dir} was interrupted; continue it with --resume")
    if result.status == "failed":
        raise RunFailed(result.error or "no trial is usable")
    return result


class _Sweep:
    """The parts of one sweep, and how they meet."""

    def __init__(self, config: Config, sweep_dir: Path, data_dir: Path, resume: bool) -> None:
        assert config.search is not None
        self._begun = time.monotonic()
        self._search: SearchConfig = config.search
        self._fit = require_capacity(config.parallel)
        self._execution, self._why = choose_execution(config)
        self._study = open_study(config.name, sweep_dir, self._search, resume)
        self._before_s = float(self._study.user_attrs.get(MAKESPAN, 0.0))
        saved = sweep_dir / CONFIG
        self._written = load_config(saved) if saved.is_file() else config
        train = open_prepared(data_dir).train
        self._train = train
        self._fill_pass = steps_in_a_pass(config, float(train.lengths.mean()))
        self._shared = Shared(
            config,
            sweep_dir,
            data_dir,
            self._search.metrics[0],
            self._search.modes[0],
            train_environment(),
        )
        self._spending = Spending(
            self._search.budget,
            {row.id: row.examples for row in self._rows()},
            float(self._study.user_attrs.get(GPU_SECONDS, 0.0)),
            self._gpus(),
            self._elapsed_s,
        )
        if resume:
            _reconcile(self._study, self._search, self._shared)

    def run(self, tell: Callable[[str], None], interrupted: threading.Event) -> None:
        """All trials, to their ends or to an interruption; afterwards nothing is reserved."""
        kept = sum(trial.state.is_finished() for trial in own_trials(self._study))
        left = trial_count(self._search) - kept
        if left <= 0 or self._spending.over():
            return
        progress = progress_for(tell, left)
        if kept:
            progress.note(f"{kept} trials are kept")
        try:
            with (
                progress.live(),
                self._place(left, progress.note) as (place, concurrent),
                tune_storage() as storage,
                settings_of_tune(),
            ):
                stop = StopWith(interrupted, place, stop_grace_s())
                told = Reports(progress, self._study, self._search, self._remember, place)
                self._tuner(left, concurrent, place, storage, stop, told, interrupted).fit()
        except TuneError as error:
            raise RunFailed(f"Ray Tune gave up: {str(error).splitlines()[-1]}") from error
        finally:
            self._remember()

    @contextmanager
    def _place(self, trials: int, note: Callable[[str], None]) -> Iterator[tuple[Place, int]]:
        """Where trials train, and how many of them at a time."""
        shared = self._shared
        if self._execution == "packed":
            found = arrange(shared.config, self._fit, trials, self._fill_pass)
            note(
                f"{trials} trials, {found.at_once} at a time in {found.engines} "
                f"engine{'s' * (found.engines != 1)} ({self._why})"
            )
            with engines(shared.config, shared.sweep_dir, shared.data_dir, found, note) as slots:
                yield slots, found.at_once
            return
        concurrent, lowered = concurrency(self._search, self._fit)
        note(f"{trials} trials, {concurrent} at a time, each on its own ({self._why})")
        if lowered:
            note(lowered)
        with groups(concurrent, note) as own:
            yield own, concurrent

    def write_result(self, interrupted: bool) -> SweepResult:
        """`result.json`, from the study and from what the trials left."""
        trials, base = self._rows(), None
        for row in trials:
            left = self._ended(row)
            base = base or (left.base if left else None)
        makespan = self._study.user_attrs.get(MAKESPAN, 0.0)
        result = sweep_result(
            trials, base, makespan, interrupted, self._search.modes[0], self._execution
        )
        result = replace(result, ended_by=self._spending.over(), pareto=pareto(self._study))
        write_json_atomic(self._shared.sweep_dir / RESULT, result)
        return result

    def _rows(self) -> list[TrialRecord]:
        return rows(self._study, self._search)

    def _ended(self, row: TrialRecord) -> RunResult | None:
        """The trial's own result; an end that only the study knows of is written now."""
        run_dir = self._shared.sweep_dir / TRIALS / row.id
        left = load_result(run_dir)
        agrees = left is not None and left.status == row.status
        if row.status in ("pruned", "failed") and not agrees and run_dir.is_dir():
            spec = spec_of(self._shared, row.id, row.params)
            return write_ended(spec, "pruned" if row.status == "pruned" else "failed", row.error)
        return left

    def _tuner(
        self,
        trials: int,
        concurrent: int,
        place: Place,
        storage: str,
        stop: tune.Stopper,
        told: tune.Callback,
        interrupted: threading.Event,
    ) -> tune.Tuner:
        shared = tune.with_parameters(SweepTrial, shared=self._shared, place=place)
        at_reports = self._remember if self._search.budget else lambda: None
        budget = StopAtBudget(self._spending, at_reports)
        return tune.Tuner(
            tune.with_resources(shared, driver_place()),
            tune_config=tune.TuneConfig(
                num_samples=trials,
                max_concurrent_trials=concurrent,
                search_alg=StudySearcher(
                    self._study,
                    self._search,
                    self._shared.config.seed,
                    self._prepare,
                    interrupted.is_set,
                    self._points(),
                    lambda: self._spending.over() is not None,
                ),
                scheduler=self._scheduler(),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=self._shared.config.name,
                storage_path=storage,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[told, budget],
                stop=CombinedStopper(stop, budget),
                verbose=0,
            ),
        )

    def _points(self) -> list[Point]:
        """The first trials, by what the model's own configuration says of it."""
        text = load_model_config(self._shared.config.model).get_text_config()
        width = getattr(text, "hidden_size", None)
        return first_points(self._shared.config, str(text.model_type), width)

    def _scheduler(self) -> Asha | Median | None:
        if self._search.scheduler is None:
            return None
        budget = _budget(self._shared.config, self._train)
        metric, mode = self._search.metrics[0], self._search.modes[0]
        rule = scheduler_for(self._search.scheduler, budget, metric, mode)
        for number, trial in enumerate(own_trials(self._study)):
            rule.recall(trial_name(number), reports(trial))
        return rule

    def _prepare(self, trial: str, params: dict[str, Any]) -> int:
        """A trial's directory with its config; returns its budget in examples."""
        trials = self._shared.sweep_dir / TRIALS
        own = apply_params(self._written, params, trial, str(trials))
        (trials / trial).mkdir(parents=True, exist_ok=True)
        write_text_atomic(trials / trial / CONFIG, dump_yaml(own))
        return _budget(own, self._train)

    def _remember(self) -> None:
        """Seconds of this driver and of the ones before it, in the study: it may be killed."""
        self._study.set_user_attr(MAKESPAN, round(self._elapsed_s(), 3))
        self._study.set_user_attr(GPU_SECONDS, round(self._spending.gpu_s, 3))

    def _gpus(self) -> float:
        """Of one trial; a trial in an engine has a slot's share."""
        parallel = self._shared.config.parallel
        gpus = parallel.max_workers * parallel.resources_per_worker.get("GPU", 0.0)
        if self._execution != "packed":
            return gpus
        trials = trial_count(self._search)
        return gpus / arrange(self._shared.config, self._fit, trials, self._fill_pass).slots

    def _elapsed_s(self) -> float:
        return self._before_s + time.monotonic() - self._begun


def _budget(config: Config, train: TokenizedSplit) -> int:
    """Examples that a run sees. Raises ConfigError where its mix leaves a source out."""
    return total_examples(config.train, pass_length(config.data, train))


def concurrency(search: SearchConfig, fit: int) -> tuple[int, str | None]:
    """Trials at a time where `fit` fit: what is written, but no more; and what to say of it."""
    wanted = fit if search.max_concurrent == "auto" else search.max_concurrent
    useful = min(wanted, trial_count(search))
    if useful <= fit:
        return useful, None
    return fit, f"search.max_concurrent={wanted} is lowered to {fit}: no more trials fit at a time"


def _reconcile(study: optuna.Study, search: SearchConfig, shared: Shared) -> None:
    """Tell the study of trials that ended while nobody was there to listen."""
    for number in unfinished(study):
        run_dir = shared.sweep_dir / TRIALS / trial_name(number)
        result = load_result(run_dir)
        if result is not None and result.status in ("completed", "early_stopped", "failed"):
            tell_outcome(study, number, outcome_of(result, search.metrics))
