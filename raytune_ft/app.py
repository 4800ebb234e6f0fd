"""What the commands do: check everything that can be checked, then hand over to one function.

The order is the same for all of them: config, run directory (and its lock), model, data, cluster.
A local Ray starts beside the checks of model and data, and ends where they refuse them. Heavy
modules are imported inside, so that `raytune-ft --help` and config errors come at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_ft import __version__
from raytune_ft.config import paths
from raytune_ft.config.environment import check_submitter, expand_text, joins_cluster
from raytune_ft.config.identity import BUDGET
from raytune_ft.config.load import (
    apply_overrides,
    choose_strategy,
    expand_env,
    load_config,
    memory_decides,
    to_plain,
)
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.resolve import resolve
from raytune_ft.config.rewards import with_answers
from raytune_ft.config.schema import Config
from raytune_ft.config.search_rules import check_examples
from raytune_ft.config.strategies import REPLICATED, SHARDED
from raytune_ft.config.trust import Code, named_code
from raytune_ft.errors import ConfigError, Interrupted, ModelError, Promoted, RunFailed
from raytune_ft.files import read_object, write_text_atomic
from raytune_ft.imports import uncollected
from raytune_ft.layout import DATA, RESULT, judges_beside
from raytune_ft.locks import Wait
from raytune_ft.model.quantise import skip_unused_bitsandbytes
from raytune_ft.preflight import (
    check_engines,
    lay_out,
    needs_ray,
    on_devices,
    placed,
    prepare,
    worker_of,
)
from raytune_ft.records import RunResult, Tell
from raytune_ft.report.write import try_report
from raytune_ft.rundir import (
    OpenRun,
    Resume,
    cache_path,
    open_run,
    probe_storage,
    remote_url,
    run_path,
)

if TYPE_CHECKING:
    from raytune_ft.data.prepared import PreparedData
    from raytune_ft.data.report import DataReport
    from raytune_ft.evaluate.sample import Sampled
    from raytune_ft.evaluate.workers import Workers
    from raytune_ft.promote.promote import Promotion
    from raytune_ft.rundir import RunSpec
    from raytune_ft.train.report import Reporter

MakeReporter = Callable[[int], "Reporter"]
"""A reporter for a run that will see this number of examples."""


@dataclass(frozen=True)
class Trained:
    """A run that ended; `result` is None where an earlier command had completed it."""

    path: Path
    result: RunResult | None


@dataclass(frozen=True)
class Swept:
    """A sweep that ended. `promotion` is None where an earlier command has promoted it; `metric`
    ranked its trials.
    """

    path: Path
    result: dict[str, Any]
    promotion: Promotion | None
    metric: str


class Backend:
    """Does the work of a command, once everything is checked."""

    def starting(self, config: Config) -> AbstractContextManager[None]:
        """What takes long to start and can start while data are prepared: the processes of a local
        Ray, which end with the context.
        """
        if joins_cluster() or not needs_ray(config):
            return nullcontext()
        from raytune_ft.ray_backend.cluster import starting

        return starting()

    def train(self, spec: RunSpec, reason: str, reporter: Reporter, tell: Tell) -> RunResult:
        """Trains one run: in this process, or on a worker group of Ray. `reason`: why so."""
        if not needs_ray(spec.config):
            from raytune_ft.estimate.hardware import require_gpu
            from raytune_ft.model.hub import fetch_here
            from raytune_ft.train.run import run_training

            require_gpu(spec.config.parallel.resources["GPU"], "this machine")
            fetch_here(spec.config, tell)
            return run_training(spec, choose_strategy(spec.config)[0], reporter)
        from raytune_ft.ray_backend.run_handle import fit

        parallel = spec.config.parallel
        size = f"{parallel.min_workers} to " * parallel.elastic + str(parallel.max_workers)
        several = "s" * (parallel.max_workers > 1)
        tell(f"starting {size} worker{several} ({parallel.strategy}: {reason})")
        return fit(spec, reporter.evaluation, tell)

    def search(self, spec: RunSpec, tell: Tell, resume: bool) -> None:
        """Runs the trials of a sweep on Ray."""
        from raytune_ft.ray_backend.sweep import run_sweep

        run_sweep(spec.config, spec.run_dir, spec.data_dir, tell, resume, spec.layouts)

    def promote(
        self, path: Path, tell: Tell, code: Code, wait_s: float | None, again: bool = False
    ) -> Promotion:
        """Promotes the best trial of a sweep, or a run."""
        from raytune_ft.promote.promote import promote

        workers_of = partial(_workers, path, tell)
        return promote(path, again, tell=tell, code=code, wait_s=wait_s, workers_of=workers_of)


def train(
    file: Path,
    overrides: Sequence[str],
    resume: Resume,
    tell: Tell,
    reporter: MakeReporter,
    backend: Backend | None = None,
    usable: int | None = None,
    wait_s: float | None = None,
) -> Trained:
    """One run. `usable`: see `placed`; `wait_s`: see `Wait`.

    Raises InputError, RunFailed or Interrupted.
    """
    check_submitter(__version__)
    backend = backend or Backend()
    written = load_config(file, overrides, tell, ignore_search=True)
    with (
        placed(written, usable, tell) as (config, reason),
        open_run(config, resume, Wait(wait_s, tell), partial(_mirrored, config, tell)) as run,
    ):
        config = _with_saved_strategy(written, config, run)
        if _has_ended(run, config):
            tell(f"{run.path} is complete; nothing is left to do")
            return Trained(run.path, None)
        with backend.starting(config):
            spec, data = _prepare(config, run, tell, usable)
            with run.begun(config):
                result = backend.train(spec, reason, reporter(_examples(config, data)), tell)
        try_report(run.path, tell)
    if result.status == "interrupted":
        raise Interrupted.of(run.path)
    if result.status == "failed":
        raise RunFailed(result.error or "the run failed")
    return Trained(run.path, result)


def sweep(
    file: Path,
    overrides: Sequence[str],
    resume: Resume,
    tell: Tell,
    backend: Backend | None = None,
    usable: int | None = None,
    wait_s: float | None = None,
    trust_run: bool = False,
) -> Swept:
    """A search and the promotion of its best trial; `usable`: see `placed`; `wait_s`: see `Wait`.

    `trust_run`: a resumed sweep may run Python code that only its own config names.

    Raises InputError, RunFailed or Interrupted.
    """
    check_submitter(__version__)
    backend = backend or Backend()
    written = load_config(file, overrides, tell)
    if written.search is None:
        raise ConfigError(
            str(file), "has no search section", "write one, or use `raytune-ft train`"
        )
    with (
        placed(written, usable, tell) as (config, _),
        open_run(config, resume, Wait(wait_s, tell), partial(_mirrored, config, tell)) as run,
    ):
        config = _with_saved_strategy(written, config, run)
        if not _has_ended(run, config):
            _check_studies(config, begun=run.saved is not None)
            with backend.starting(config):
                spec, data = _prepare(config, run, tell, usable)
                assert spec.config.search is not None
                check_examples(spec.config.search, _examples(config, data))
                with run.begun(config):
                    backend.search(spec, tell, run.saved is not None)
        try:
            code = None if trust_run else named_code(config)
            make = partial(backend.promote, code=code, wait_s=wait_s)
            promotion = _promote_once(run.path, tell, make)
        finally:
            try_report(run.path, tell)
        result = read_object(run.path / RESULT) or {}
        return Swept(run.path, result, promotion, written.search.metrics[0])


def promote(
    directory: Path,
    again: bool,
    tell: Tell,
    once: bool = False,
    wait_s: float | None = None,
    trust_run: bool = False,
) -> Promotion | None:
    """Promote the best checkpoint of a run or a sweep, and write its report.

    `once` leaves an earlier promotion as it is, and returns None; `wait_s`: see `Wait`;
    `trust_run`: run the Python code that the config in the directory names.

    On a cluster its workers do that, and measure several candidates at the same time. Raises what
    `promote.promote.promote` does.
    """
    if once and again:
        raise ConfigError(
            "--again", "makes another promotion at every start", "leave out --again or --resume"
        )
    with ExitStack() as stack:
        if joins_cluster():
            from raytune_ft.ray_backend.cluster import connected

            stack.enter_context(connected())
        make = partial(Backend().promote, code=None if trust_run else (), wait_s=wait_s)
        if once:
            promotion = _promote_once(directory, tell, make)
        else:
            promotion = make(directory, tell, again=again)
    try_report(directory, tell)
    return promotion


def evaluate(model: str, file: Path, overrides: Sequence[str], tell: Tell) -> dict[str, Any]:
    """The test metrics of a config for any model directory, hub id or `builtin:` model.

    Raises InputError, RunFailed or Interrupted.
    """
    with placed(load_config(file, overrides, tell)) as (config, _):
        config, storage = expand_env(config), run_path(config).parent
        probe_storage(storage)
        from raytune_ft.evaluate.evaluate import evaluate_directory

        directory = _model_directory(model)
        workers = _workers(storage, tell, config)
        found = evaluate_directory(directory, config, cache_path(config), workers, tell)
    split, examples, metrics = found
    return {"split": split, "examples": examples, **metrics}


def sample(
    model: str,
    file: Path,
    overrides: Sequence[str],
    out: Path,
    pairs: Path | None,
    best: Path | None,
    prompts: Path | None,
    split: str | None,
    tell: Tell,
) -> Sampled:
    """Completions of a config's prompts, scored by its rewards; preferences from them in `pairs`,
    and of each prompt the best one in `best`.

    All of it is done in this process and in those of rewards. Raises InputError or RunFailed.
    """
    if joins_cluster():
        raise ConfigError(
            f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}",
            "names a cluster, and `sample` works on one machine",
            "unset RAY_ADDRESS",
        )
    written, devices = on_devices(load_config(file, overrides, tell), joined=False)
    skip_unused_bitsandbytes(written)
    config = expand_env(resolve(written), rewards=True)
    _check_sampling(config, pairs, best)
    tell(devices)
    probe_storage(run_path(config).parent)
    rewards = with_answers(config.rewards, judges_beside(cache_path(config)))
    config = config.model_copy(update={"rewards": rewards})
    from raytune_ft.evaluate.sample import Asked, run_sample
    from raytune_ft.model.hub import given_model

    given = given_model(config.model, _model_directory(model))
    asked = Asked(given, out, pairs, best, prompts, split)
    return run_sample(asked, config, cache_path(config), tell)


def _check_sampling(config: Config, pairs: Path | None, best: Path | None) -> None:
    objective, sampling = config.train.objective, config.sampling
    if OBJECTIVES[objective].head:
        raise ConfigError(
            f"train.objective={objective}",
            "trains a model that labels examples and writes no text",
            "write the config of a model that predicts tokens",
        )
    if sampling.temperature == 0 and sampling.n > 1:
        raise ConfigError(
            "sampling.temperature=0",
            f"gives {sampling.n} times the same completion",
            "write --n 1, or a temperature above 0",
        )
    for option, path in (("--pairs", pairs), ("--best", best)):
        if path is not None and (not config.rewards or sampling.n < 2):
            rule = "needs two completions of a prompt" if config.rewards else "needs scores"
            remedy = "--n 2 or more" if config.rewards else "rewards: [...] in the config"
            raise ConfigError(f"{option} {path}", rule, f"write {remedy}")


def _model_directory(model: str) -> Path:
    """MODEL_DIR of the command line. Raises ModelError for a path that does not exist."""
    if not Path(model).exists() and Path(model).parent.is_dir() and "/" in model:
        raise ModelError(f"MODEL_DIR={model}", "does not exist", "write an existing directory")
    return Path(paths.model(model, Path.cwd()))


def _workers(folder: Path, tell: Tell, config: Config) -> Workers:
    """Where models of this config are measured: on a cluster never in this process."""
    if joins_cluster():
        from raytune_ft.ray_backend.call import WorkerGroups

        return WorkerGroups(config, folder, tell)
    from raytune_ft.evaluate.workers import ThisProcess

    return ThisProcess(config.parallel)


def _with_saved_strategy(written: Config, config: Config, run: OpenRun) -> Config:
    """`config` with the strategy of the resumed run, where `auto` could choose another one only
    because the memory of a worker has changed since.
    """
    if run.saved is None or not memory_decides(written):
        return config
    before, now = run.saved.parallel, config.parallel
    depends_on = ("workers", "offload", "replicas")
    same = all(getattr(before, key) == getattr(now, key) for key in depends_on)
    if not same or before.strategy not in (REPLICATED, SHARDED):
        return config
    return apply_overrides(config, {"parallel.strategy": before.strategy})


def _mirrored(config: Config, tell: Tell, resume: bool) -> AbstractContextManager[None]:
    """Copies the run directory to its object store, where `storage` names one."""
    if remote_url(config) is None:
        return nullcontext()
    from raytune_ft.checkpoints.mirror import mirrored

    return mirrored(remote_url(config), run_path(config), resume, tell)


def _prepare(
    config: Config, run: OpenRun, tell: Tell, usable: int | None
) -> tuple[RunSpec, PreparedData]:
    with uncollected():
        from raytune_ft.evaluate.precompute import rated, referenced, taught
    from raytune_ft.rundir import RunSpec

    expanded = expand_env(config)
    check_engines(expanded)
    workers = _workers(run.path, tell, expanded)
    rows = rated(expanded, prepare(expanded, tell), tell, workers)
    accept = partial(_is_begun, run)
    data = taught(expanded, rows, tell, accept, workers)
    data = referenced(expanded, data, tell, accept, workers)
    _keep_or_compare(run, data.report)
    found, hardware = worker_of(expanded)
    layouts = lay_out(expanded, data, found if usable is None else usable, hardware, tell)
    spec = RunSpec(expanded, run.path, data.path, layouts=layouts)
    if expanded.search is not None:
        return spec, data
    (layout,) = layouts.values()
    return replace(spec, config=layout.of(expanded), forecast=layout.forecast), data


def _keep_or_compare(run: OpenRun, report: DataReport) -> None:
    """Saves the data report of a new run; refuses a resume on other data (DataError)."""
    if not _is_begun(run, report):
        write_text_atomic(run.path / DATA, report.to_json() + "\n")


def _is_begun(run: OpenRun, report: DataReport) -> bool:
    """Whether the run has begun, with these data; DataError where it began with others."""
    from raytune_ft.data.report import check_same

    saved = run.path / DATA
    begun = run.has_measured and saved.exists()
    if begun:
        check_same(saved, report)
    return begun


def _check_studies(config: Config, begun: bool) -> None:
    """Opens the study of the sweep and, where it is new, those of `search.warm_start`, before
    anything is spent. Raises StorageError.
    """
    from raytune_ft.search.initial_trials import earlier_trials
    from raytune_ft.search.space import open_storage

    search = config.search
    assert search is not None
    if search.storage is not None:
        open_storage(expand_text(search.storage, "search.storage"))
    if not begun:
        earlier_trials(search)


def _promote_once(path: Path, tell: Tell, make: Callable[..., Promotion]) -> Promotion | None:
    """None where an earlier command has promoted it."""
    try:
        return make(path, tell=tell)
    except Promoted as error:
        tell(f"{error.value} is kept; `raytune-ft promote {path} --again` makes another")
        return None


def _examples(config: Config, data: PreparedData) -> int:
    from raytune_ft.data.order import pass_length
    from raytune_ft.train.optim import total_examples

    return total_examples(config.train, pass_length(config.data, data.train))


def _has_ended(run: OpenRun, config: Config) -> bool:
    """Whether a resume finds the run complete under the same budget and number of trials."""
    if run.saved is None or not (run.path / RESULT).is_file():
        return False
    if (read_object(run.path / RESULT) or {}).get("status") not in ("completed", "early_stopped"):
        return False
    searches = [each.search for each in (run.saved, config)]
    limits = [(each.trials, each.budget) if each else None for each in searches]
    return limits[0] == limits[1] and _budget(run.saved) == _budget(config)


def _budget(config: Config) -> list[Any]:
    plain = to_plain(config)
    return [plain["train"][key.removeprefix("train.")] for key in BUDGET]
