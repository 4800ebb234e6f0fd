"""A sweep: Optuna draws the trials, Ray Tune runs them, the scheduler stops the weak ones."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.error import TuneError
from ray.tune.execution import class_cache
from ray.tune.stopper import CombinedStopper

from raytune_ft.config.environment import names_in
from raytune_ft.config.execution import arrange, choose_execution
from raytune_ft.config.load import dump_yaml, load_config, to_plain
from raytune_ft.config.objectives import SEARCHABLE
from raytune_ft.config.schema import Config, ParallelConfig
from raytune_ft.config.search import SearchConfig
from raytune_ft.config.search_space import Point, trial_count
from raytune_ft.data.order import pass_length
from raytune_ft.data.prepared import open_prepared
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ClusterError, Interrupted, RunFailed
from raytune_ft.estimate.memory import steps_in_a_pass
from raytune_ft.files import write_json_atomic, write_text_atomic
from raytune_ft.layout import CONFIG, RESULT, TRIALS
from raytune_ft.model.load import load_model_config
from raytune_ft.ray_backend.capacity import (
    Demand,
    Steps,
    autoscaler_runs,
    awaited,
    looking,
    staying,
)
from raytune_ft.ray_backend.cluster import (
    Nodes,
    connected,
    ray_storage,
    stop_grace_s,
    train_environment,
    whole_groups,
)
from raytune_ft.ray_backend.environment import check_environment
from raytune_ft.ray_backend.metrics import DriverGauges, measured
from raytune_ft.ray_backend.schedulers import ResumableScheduler, scheduler_for
from raytune_ft.ray_backend.searcher import OfThisProcess, StudySearcher
from raytune_ft.ray_backend.trial import (
    Engines,
    Execution,
    Groups,
    Places,
    Shared,
    SweepTrial,
    driver_place,
    outcome_of,
    spec_of,
)
from raytune_ft.records import RunResult, TrialRecord
from raytune_ft.rundir import Layout
from raytune_ft.search.initial_trials import first_points
from raytune_ft.search.progress import Progress, progress_for
from raytune_ft.search.results import Spending, SweepResult, apply_params, sweep_result, trial_name
from raytune_ft.search.study import (
    live,
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
from raytune_ft.train.result import end_run, failed_result, load_result
from raytune_ft.train.setup import head_before
from raytune_ft.train.stopping import interruptible

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard beside our own files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it catches SIGINT alone; `interruptible` catches both
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the outcome of a failed trial has no metric
    "TUNE_MAX_PENDING_TRIALS_PG": "10000",  # the searcher holds trials back, as nodes allow
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # one line of it is in the trial's row
    "RAY_AIR_NEW_OUTPUT": "0",  # together with verbose=0: no output of Tune's own
}


@contextmanager
def settings_of_tune() -> Iterator[None]:
    """Sets the environment variables from which Tune reads its settings.

    Tune would also hand on the keys of AWS, whose values Ray then keeps in its state. Only the
    driver needs them.
    """
    keys = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(keys)
    before = {name: os.environ.get(name) for name in TUNE_SETTINGS}
    os.environ.update(TUNE_SETTINGS)
    level = logging.getLogger("ray.tune").level
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE.update(keys)
        logging.getLogger("ray.tune").setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class StopAtBudget(OfThisProcess, tune.Stopper, tune.Callback):
    """Stops a running trial at its next report once the budget is used up.

    `remember` saves what was spent. The searcher sees to it that no new trial begins.
    """

    def __init__(self, spending: Spending, remember: Callable[[], None]) -> None:
        self._spending, self._remember = spending, remember
        self._names: dict[str, str] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial that reports shall stop; False for one that has just ended."""
        self._spending.trained(self._names[trial_id], int(result.get("examples", 0)))
        self._remember()
        return not result.get("done") and self._spending.over() is not None

    def stop_all(self) -> bool:
        """Never: each trial ends at its own next report."""
        return False

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._names[trial.trial_id] = trial.config["trial"]
        self._spending.began(trial.config["trial"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._spending.ended(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._spending.ended(trial.config["trial"])


class StopWith(OfThisProcess, tune.Stopper):
    """Ends the sweep after a signal: trials are asked to save and to leave.

    Tune kills every trial that still runs 10 s after the stopper says "stop". So the stopper says
    it only when no trial holds workers any more, or when `grace_s` for their checkpoints is over.
    """

    def __init__(
        self,
        interrupted: threading.Event,
        execution: Execution,
        grace_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interrupted, self._execution = interrupted, execution
        self._grace_s, self._clock = grace_s, clock
        self._told_at: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never: `stop_all` decides."""
        return False

    def stop_all(self) -> bool:
        """Tune asks between events."""
        if not self._interrupted.is_set():
            return False
        if self._told_at is None:
            self._told_at = self._clock()
            self._execution.stop_all()
        if self._clock() - self._told_at > self._grace_s:
            return True
        return not self._execution.open_runs()


class ProgressCallback(OfThisProcess, tune.Callback):
    """Passes what Tune reports on to `progress`, and failures to the study."""

    def __init__(
        self,
        progress: Progress,
        study: optuna.Study,
        search: SearchConfig,
        after_trial: Callable[[], None],
        execution: Execution,
        gauges: DriverGauges,
    ) -> None:
        self._progress, self._study, self._search = progress, study, search
        self._gauges = gauges
        self._after_trial, self._execution = after_trial, execution

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._gauges.started(trial.config["trial"])
        self._progress.started(trial.config["trial"], trial.config["params"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "eval_loss" in result:
            value = result[self._search.metrics[0]]
            self._progress.reported(trial.config["trial"], result["examples"], value)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._finished(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process of the trial died or raised: end its run, which others wait for, and record
        the failure in the study.
        """
        try:
            self._execution.give_up(trial.config["trial"])
        except RunFailed as error:
            self._progress.note(f"{trial.config['trial']}: {error}")
        own = live(self._study, trial.config["number"])
        tell_failed(own, _last_line(trial.error_file))
        self._finished(trial)

    def _finished(self, trial: Any) -> None:
        name = trial.config["trial"]
        every = rows(self._study, self._search)
        row = next(row for row in every if row.id == name)
        self._gauges.ended(name, row.status)
        if row.status != "interrupted":
            self._after_trial()
            self._progress.finished(name, row.status, row.value, row.error)


def _last_line(path: str | None) -> str:
    """Type and message of an error, the last line of the file that Tune wrote about it."""
    text = Path(path).read_text(encoding="utf-8") if path else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"the trial's process failed: {lines[-1] if lines else 'no reason is known'}"[:300]


MAKESPAN, GPU_SECONDS = "makespan_s", "gpu_s"


def run_sweep(
    config: Config,
    sweep_dir: Path,
    data_dir: Path,
    tell: Callable[[str], None],
    resume: bool = False,
    layouts: Mapping[str, Layout] | None = None,
) -> SweepResult:
    """Run the trials of `config.search`; leave `study.db`, `trials/` and `result.json`.

    Args:
        config: resolved, `${ENV_NAME}` expanded.
        sweep_dir: exists and is locked by the caller. Trials inherit `config.yaml` in it, in which
            a secret is still `${ENV_NAME}`.
        data_dir: the directory of `PreparedData`, on every node.
        tell: gets the progress lines where there is no terminal.
        resume: keep the trials that have ended, continue the others, draw the rest.
        layouts: of trials, by the name of their method.

    Raises:
        ClusterError: the cluster cannot hold one trial, also after it was waited for nodes.
        StorageError: the study cannot be opened or belongs to another sweep.
        RunFailed: no trial is usable; `result.json` has that status.
        Interrupted: SIGINT or SIGTERM; `result.json` has that status, and a resume continues.
    """
    assert config.search is not None
    stop_grace_s()  # raises ConfigError before any trial starts
    with (
        connected(),
        awaited(config.parallel, tell) as (fit, demand),
        interruptible() as interrupted,
    ):
        sweep = _Sweep(config, sweep_dir, data_dir, fit, demand, resume, layouts or {})
        check_environment(config, tell)
        result = sweep.run(tell, interrupted)
    if result.status == "interrupted":
        raise Interrupted.of(sweep_dir)
    if result.status == "failed":
        raise RunFailed(result.error or "no trial is usable")
    return result


class _Sweep:
    """One sweep: its study, what its trials share, and what it has spent."""

    def __init__(
        self,
        config: Config,
        sweep_dir: Path,
        data_dir: Path,
        fit: int,
        demand: Demand,
        resume: bool,
        layouts: Mapping[str, Layout],
    ) -> None:
        assert config.search is not None
        self._begun = time.monotonic()
        saved = sweep_dir / CONFIG
        self._written = load_config(saved) if saved.is_file() else config
        # An engine has one layout for the trials of every method.
        self._config = next(iter(layouts.values())).of(config) if layouts else config
        assert self._written.search is not None
        # As written: parameters go to the study, to Ray and into files.
        self._search: SearchConfig = self._written.search
        self._fit, self._demand = fit, demand  # worker groups at the start
        self._execution, self._why = choose_execution(config)
        self._study = open_study(config.name, sweep_dir, self._search, resume)
        self._before_s = float(self._study.user_attrs.get(MAKESPAN, 0.0))
        train = open_prepared(data_dir).train
        self._train = train
        self._fill_pass = steps_in_a_pass(config, float(train.lengths.mean()))
        self._shared = Shared(
            self._written,
            sweep_dir,
            data_dir,
            self._search.metrics[0],
            self._search.modes[0],
            train_environment(),
            {
                name: os.environ[name]
                for name in names_in(to_plain(self._written))
                if name in os.environ
            },
            layouts,
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

    def run(self, tell: Callable[[str], None], interrupted: threading.Event) -> SweepResult:
        """Run all trials until they end or the sweep is interrupted; then nothing is reserved."""
        self._run_trials(tell, interrupted)
        return self.write_result(interrupted.is_set())

    def _run_trials(self, tell: Callable[[str], None], interrupted: threading.Event) -> None:
        kept = sum(trial.state.is_finished() for trial in own_trials(self._study))
        left = trial_count(self._search) - kept
        if left <= 0 or self._spending.over():
            return
        progress = progress_for(tell, left, SEARCHABLE[self._search.metrics[0]])
        if kept:
            progress.note(f"{kept} trials are kept")
        try:
            with (
                progress.live(),
                self._open_places(left, progress.note) as places,
                ray_storage() as storage,
                settings_of_tune(),
                measured(self._shared.sweep_dir) as gauges,
            ):
                searcher = self._searcher(interrupted)
                growth = Growth(self._config, places, searcher, self._demand, progress.note)
                stop = StopWith(interrupted, places.execution, stop_grace_s())
                reports = ProgressCallback(
                    progress, self._study, self._search, self._remember, places.execution, gauges
                )
                with looking(growth.look):
                    self._tuner(left, searcher, places.execution, storage, stop, reports).fit()
        except TuneError as error:
            raise RunFailed(f"Ray Tune gave up: {str(error).splitlines()[-1]}") from error
        finally:
            self._remember()

    def _open_places(
        self, trials: int, note: Callable[[str], None]
    ) -> AbstractContextManager[Places]:
        """Where trials train."""
        shared = self._shared
        if self._execution == "packed":
            found = arrange(self._config, self._fit, trials, self._fill_pass)
            note(
                f"{trials} trials, {found.at_once} at a time in {found.engines} "
                f"engine{'s' * (found.engines != 1)} ({self._why})"
            )
            return closing(Engines(self._config, shared.sweep_dir, shared.data_dir, found, note))
        concurrent, lowered = concurrency(self._search, self._fit)
        note(f"{trials} trials, {concurrent} at a time, each on its own ({self._why})")
        if lowered:
            note(lowered)
        return closing(Groups(note))

    def write_result(self, interrupted: bool) -> SweepResult:
        """Write `result.json` from the study and the results of the trials."""
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
        """The trial's own result; it is written here where only the study knows how it ended."""
        run_dir = self._shared.sweep_dir / TRIALS / row.id
        left = load_result(run_dir)
        agrees = left is not None and left.status == row.status
        if row.status in ("pruned", "failed") and not agrees and run_dir.is_dir():
            spec = spec_of(self._shared, row.id, row.params)
            pruned = row.status == "pruned"
            return end_run(spec, "pruned" if pruned else failed_result(spec, row.error))
        return left

    def _tuner(
        self,
        trials: int,
        searcher: StudySearcher,
        execution: Execution,
        storage: str,
        stop: tune.Stopper,
        reports: tune.Callback,
    ) -> tune.Tuner:
        shared = tune.with_parameters(SweepTrial, shared=self._shared, execution=execution)
        at_reports = self._remember if self._search.budget else lambda: None
        budget = StopAtBudget(self._spending, at_reports)
        return tune.Tuner(
            tune.with_resources(shared, driver_place()),
            tune_config=tune.TuneConfig(
                num_samples=trials,
                search_alg=searcher,
                scheduler=self._scheduler(),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=self._config.name,
                storage_path=storage,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[reports, budget],
                stop=CombinedStopper(stop, budget),
                verbose=0,
            ),
        )

    def _searcher(self, interrupted: threading.Event) -> StudySearcher:
        return StudySearcher(
            self._study,
            self._search,
            self._config.seed,
            self._prepare,
            interrupted.is_set,
            points_for(self._written),
            lambda: self._spending.over() is not None,
        )

    def _scheduler(self) -> ResumableScheduler | None:
        if self._search.scheduler is None:
            return None
        budget = _budget(self._config, self._train)
        metric, mode = self._search.metrics[0], self._search.modes[0]
        rule = scheduler_for(self._search.scheduler, budget, metric, mode)
        for number, trial in enumerate(own_trials(self._study)):
            rule.recall(trial_name(number), reports(trial))
        return rule

    def _prepare(self, trial: str, params: dict[str, Any]) -> int:
        """Make a trial's directory with its config; returns its budget in examples."""
        trials = self._shared.sweep_dir / TRIALS
        own = apply_params(self._written, params, trial, str(trials))
        (trials / trial).mkdir(parents=True, exist_ok=True)
        write_text_atomic(trials / trial / CONFIG, dump_yaml(own))
        return _budget(own, self._train)

    def _remember(self) -> None:
        """Save the seconds of all drivers so far in the study: this one may be killed."""
        self._study.set_user_attr(MAKESPAN, round(self._elapsed_s(), 3))
        self._study.set_user_attr(GPU_SECONDS, round(self._spending.gpu_s, 3))

    def _gpus(self) -> float:
        """GPUs of one trial; a packed trial has the share of one slot."""
        parallel = self._config.parallel
        gpus = parallel.max_workers * parallel.resources["GPU"]
        if self._execution != "packed":
            return gpus
        trials = trial_count(self._search)
        return gpus / arrange(self._config, self._fit, trials, self._fill_pass).slots

    def _elapsed_s(self) -> float:
        return self._before_s + time.monotonic() - self._begun


class Growth:
    """Keeps a sweep as large as the cluster: it follows nodes that join and leave.

    Where an autoscaler runs, nodes for the worker groups that are of use are asked of it. As trials
    run out, groups without one end and their nodes can go.
    """

    def __init__(
        self,
        config: Config,
        places: Places,
        searcher: StudySearcher,
        demand: Demand,
        note: Callable[[str], None],
        nodes: Callable[[ParallelConfig], Nodes] = staying,
    ) -> None:
        assert config.search is not None
        self._parallel, self._written = config.parallel, config.search.max_concurrent
        self._places, self._searcher, self._note, self._nodes = places, searcher, note, nodes
        self._demand, self._steps, self._kept = demand, Steps(), 0

    def look(self) -> None:
        """Start, end and ask for what fits and is of use now."""
        places, left = self._places, self._searcher.left
        wanted = left if self._written == "auto" else min(left, self._written)
        useful = -(-wanted // places.trials_each)
        fit = max(1, self._room())  # one fits, or the sweep would not have begun; it may return
        keep = min(useful, fit)
        if keep > self._kept > 0:
            self._note(f"nodes have joined: {keep * places.trials_each} trials at a time")
        self._kept = keep
        places.keep(keep, fit)
        # Never 0: the searcher is asked once more, to say that it has finished.
        self._searcher.at_once = max(1, min(keep * places.trials_each, wanted))
        more = self._steps.next(max(0, useful - fit), fit) if autoscaler_runs() else 0
        own = places.held() if self._parallel.elastic else 0  # whose demand is their own
        self._demand.ask(max(0, min(useful, fit + more) - own))

    def _room(self) -> int:
        """Worker groups that fit now."""
        parallel = self._parallel
        try:
            nodes = self._nodes(parallel)
        except ClusterError:  # the last node with the labels has left
            return 0
        resources, workers = parallel.resources, parallel.max_workers
        return whole_groups(nodes, resources, workers, parallel.placement)


def points_for(config: Config) -> list[Point]:
    """The first trials of a sweep, chosen by the type and width of its model."""
    text = load_model_config(config.model, head_before(config)).get_text_config()
    return first_points(config, str(text.model_type), getattr(text, "hidden_size", None))


def _budget(config: Config, train: TokenizedSplit) -> int:
    """Examples that a run sees; ConfigError where a source gets no examples."""
    return total_examples(config.train, pass_length(config.data, train))


def concurrency(search: SearchConfig, fit: int) -> tuple[int, str | None]:
    """(trials at a time, a note where fewer than `search.max_concurrent` fit).

    `fit` is how many trials the cluster holds at a time.
    """
    wanted = fit if search.max_concurrent == "auto" else search.max_concurrent
    useful = min(wanted, trial_count(search))
    if useful <= fit:
        return useful, None
    return fit, f"search.max_concurrent={wanted} is lowered to {fit}: no more trials fit at a time"


def _reconcile(study: optuna.Study, search: SearchConfig, shared: Shared) -> None:
    """Add to the study the trials that ended without a driver."""
    for number in unfinished(study):
        run_dir = shared.sweep_dir / TRIALS / trial_name(number)
        result = load_result(run_dir)
        if result is not None and result.status in ("completed", "early_stopped", "failed"):
            tell_outcome(live(study, number), outcome_of(result, search.metrics))
