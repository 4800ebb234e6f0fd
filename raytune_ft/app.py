"""What the commands do: check everything that can be checked, then hand over to one function.

The order is the same for all of them: config, run directory (and its lock), model, data, cluster.
Heavy modules are imported inside, so that `raytune-ft --help` and config errors come at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_ft.config import paths
from raytune_ft.config.environment import in_ray_job
from raytune_ft.config.identity import BUDGET
from raytune_ft.config.load import (
    apply_overrides,
    choose_strategy,
    expand_env,
    load_config,
    memory_decides,
    to_plain,
)
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.config.search_rules import check_examples
from raytune_ft.errors import ConfigError, Interrupted, ModelError, RunFailed
from raytune_ft.files import write_text_atomic
from raytune_ft.layout import DATA, PROMOTED, RESULT
from raytune_ft.preflight import prepare
from raytune_ft.records import RunResult, Tell
from raytune_ft.report.collect import read_json
from raytune_ft.report.write import try_report
from raytune_ft.rundir import OpenRun, cache_path, open_run, probe_storage, remote_url, run_path

if TYPE_CHECKING:
    from raytune_ft.data.prepare import PreparedData
    from raytune_ft.data.report import DataReport
    from raytune_ft.promote.promote import Promotion
    from raytune_ft.train.report import Reporter
    from raytune_ft.train.spec import RunSpec

MakeReporter = Callable[[int], "Reporter"]  # from the examples of the whole run


@dataclass(frozen=True)
class Trained:
    """A run that ended; `result` is None where it had ended before and nothing was to do."""

    path: Path
    result: RunResult | None


@dataclass(frozen=True)
class Swept:
    """A sweep that ended, and what was promoted from it (None: it was promoted before). `metric`
    ranked its trials.
    """

    path: Path
    result: dict[str, Any]
    promotion: Promotion | None
    metric: str


def train(
    file: Path, overrides: Sequence[str], resume: bool, tell: Tell, reporter: MakeReporter
) -> Trained:
    """One run. Raises InputError, RunFailed or Interrupted."""
    written = load_config(file, overrides, tell, ignore_search=True)
    with (
        placed(written) as (config, reason),
        _mirrored(config, resume, tell),
        open_run(config, resume) as run,
    ):
        config = _as_it_began(written, config, run)
        if _has_ended(run, config):
            tell(f"{run.path} is complete; nothing is left to do")
            return Trained(run.path, None)
        spec, data = _prepare(config, run, tell)
        with run.begun(config):
            result = _run(spec, reason, reporter(_examples(config, data)), tell)
        try_report(run.path, tell)
    if result.status == "interrupted":
        raise Interrupted(f"{run.path} was interrupted; continue it with --resume")
    if result.status == "failed":
        raise RunFailed(result.error or "the run failed")
    return Trained(run.path, result)


def sweep(file: Path, overrides: Sequence[str], resume: bool, tell: Tell) -> Swept:
    """A search and the promotion of its best trial. Raises InputError, RunFailed, Interrupted."""
    written = load_config(file, overrides, tell)
    if written.search is None:
        raise ConfigError(
            str(file), "has no search section", "write one, or use `raytune-ft train`"
        )
    with (
        placed(written) as (config, _),
        _mirrored(config, resume, tell),
        open_run(config, resume) as run,
    ):
        config = _as_it_began(written, config, run)
        if not _has_ended(run, config):
            _ask_studies(config, begun=run.saved is not None)
            spec, data = _prepare(config, run, tell)
            assert spec.config.search is not None
            check_examples(spec.config.search, _examples(config, data))
            with run.begun(config):
                _search(spec, tell, resume)
        try:
            promotion = _promote_once(run.path, tell)
        finally:
            try_report(run.path, tell)
        result = read_json(run.path / RESULT) or {}
        return Swept(run.path, result, promotion, written.search.metrics[0])


def promote(directory: Path, again: bool, tell: Tell) -> Promotion:
    """What is best of a run or a sweep, and the report of it. See `promote.promote`.

    Candidates are measured at the same time on the cluster that this process is told of.
    """
    from raytune_ft.promote.promote import promote as make

    with ExitStack() as stack:
        if os.environ.get("RAY_ADDRESS", "local") != "local" or in_ray_job():
            from raytune_ft.ray_backend.cluster import connected

            stack.enter_context(connected())
        promotion = make(directory, again, tell=tell)
    try_report(directory, tell)
    return promotion


def evaluate(model: str, file: Path, overrides: Sequence[str], tell: Tell) -> dict[str, Any]:
    """The test metrics of a config for any model directory, hub id or `builtin:` model."""
    config = expand_env(resolve(load_config(file, overrides, tell)))
    probe_storage(run_path(config).parent)
    from raytune_ft.evaluate.evaluate import evaluate_directory

    if not Path(model).exists() and Path(model).parent.is_dir() and "/" in model:
        raise ModelError(f"MODEL_DIR={model}", "does not exist", "write an existing directory")
    directory = Path(paths.model(model, Path.cwd()))
    split, examples, metrics = evaluate_directory(directory, config, cache_path(config))
    return {"split": split, "examples": examples, **metrics}


@contextmanager
def placed(written: Config, usable: int | None = None) -> Iterator[tuple[Config, str]]:
    """The resolved config, and why it has its strategy.

    A cluster that is joined says first whether it has several nodes, and how much memory a worker
    has there, unless `usable` says it.
    """
    with ExitStack() as stack:
        several = False
        joined = joins_cluster(written)
        if joined:
            from raytune_ft.ray_backend.cluster import connected, node_count

            stack.enter_context(connected())
            several = node_count() > 1
        shortage = _shortage(written, joined, usable)
        config = resolve(written, disposable_cwd=several or in_ray_job(), shortage=shortage)
        yield config, choose_strategy(written, shortage)[1]


def _shortage(written: Config, joined: bool, usable: int | None) -> str | None:
    """Why a whole copy of the model does not fit on a worker, where a choice depends on it."""
    if not memory_decides(written) or written.parallel.replicas > 1:
        return None
    from raytune_ft.estimate.hardware import worker_memory
    from raytune_ft.estimate.memory import shortage

    parallel = written.parallel
    if usable is None and joined:
        from raytune_ft.ray_backend.memory import cluster_worker_memory

        usable = cluster_worker_memory(parallel.resources_per_worker)
    elif usable is None:
        usable = worker_memory(parallel.max_workers, parallel.resources_per_worker.get("GPU", 0.0))
    return shortage(expand_env(written), usable)


def _as_it_began(written: Config, config: Config, run: OpenRun) -> Config:
    """With the strategy of the run that is resumed, where `auto` might choose another one by a
    memory that has changed meanwhile, and nothing else that it depends on has.
    """
    if run.saved is None or not memory_decides(written):
        return config
    before, now = run.saved.parallel, config.parallel
    depends_on = ("workers", "offload", "replicas")
    same = all(getattr(before, key) == getattr(now, key) for key in depends_on)
    if not same or before.strategy not in ("ddp", "fsdp"):
        return config
    return apply_overrides(config, {"parallel.strategy": before.strategy})


def _mirrored(config: Config, resume: bool, tell: Tell) -> AbstractContextManager[None]:
    """Copies a run to its object store, where its storage is one."""
    if remote_url(config) is None:
        return nullcontext()
    from raytune_ft.checkpoints.mirror import mirrored

    return mirrored(remote_url(config), run_path(config), resume, tell)


def joins_cluster(config: Config) -> bool:
    """Does it run on a cluster that is there already?"""
    return os.environ.get("RAY_ADDRESS", "local") != "local" and _needs_ray(config)


def _needs_ray(config: Config) -> bool:
    return config.search is not None or choose_strategy(config)[0] != "single"


def _prepare(config: Config, run: OpenRun, tell: Tell) -> tuple[RunSpec, PreparedData]:
    from raytune_ft.evaluate.precompute import rated, taught

    expanded = expand_env(config)
    rows = rated(expanded, prepare(expanded, tell), tell)
    data = taught(expanded, rows, tell, accept=partial(_is_begun, run))
    _keep_or_compare(run, data.report)
    if _needs_ray(expanded):
        from raytune_ft.model.meta import build_shapes
        from raytune_ft.train.setup import head_of

        # Whether the model takes the method, before workers start.
        build_shapes(expanded.model, expanded.method, head_of(expanded, data.report))
    from raytune_ft.train.spec import RunSpec

    return RunSpec(config=expanded, run_dir=run.path, data_dir=data.path), data


def _keep_or_compare(run: OpenRun, report: DataReport) -> None:
    """A run keeps the report of its data; a resume refuses other data."""
    if not _is_begun(run, report):
        write_text_atomic(run.path / DATA, report.to_json() + "\n")


def _is_begun(run: OpenRun, report: DataReport) -> bool:
    """Has the run begun, with these data? Raises DataError where it has with others."""
    from raytune_ft.data.report import check_same

    saved = run.path / DATA
    begun = run.has_measured and saved.exists()
    if begun:
        check_same(saved, report)
    return begun


def _run(spec: RunSpec, reason: str, reporter: Reporter, tell: Tell) -> RunResult:
    if not _needs_ray(spec.config):
        from raytune_ft.train.run import run_training

        return run_training(spec, "single", reporter)
    from raytune_ft.ray_backend.run_handle import fit

    parallel = spec.config.parallel
    size = f"{parallel.min_workers} to " * parallel.elastic + str(parallel.max_workers)
    tell(f"starting {size} workers ({parallel.strategy}: {reason})")
    return fit(spec, reporter.evaluation, tell)


def _ask_studies(config: Config, begun: bool) -> None:
    """Whether studies answer before anything is spent, earlier ones too where this sweep has not
    begun and learns from them. Raises StorageError.
    """
    from raytune_ft.search.initial_trials import earlier_trials
    from raytune_ft.search.space import open_storage

    search = expand_env(config).search
    assert search is not None
    if search.storage is not None:
        open_storage(search.storage)
    if not begun:
        earlier_trials(search)


def _search(spec: RunSpec, tell: Tell, resume: bool) -> None:
    from raytune_ft.ray_backend.sweep import run_sweep

    run_sweep(spec.config, spec.run_dir, spec.data_dir, tell, resume)


def _promote_once(path: Path, tell: Tell) -> Promotion | None:
    if (path / PROMOTED).exists():
        tell(f"{path / PROMOTED} is kept; `raytune-ft promote {path} --again` makes another")
        return None
    from raytune_ft.promote.promote import promote

    return promote(path, tell=tell)


def _examples(config: Config, data: PreparedData) -> int:
    from raytune_ft.data.order import pass_length
    from raytune_ft.train.optim import total_examples

    return total_examples(config.train, pass_length(config.data, data.train))


def _has_ended(run: OpenRun, config: Config) -> bool:
    """Whether a resume finds the run complete, and no other budget or number of trials."""
    if run.saved is None or not (run.path / RESULT).is_file():
        return False
    if (read_json(run.path / RESULT) or {}).get("status") not in ("completed", "early_stopped"):
        return False
    searches = [each.search for each in (run.saved, config)]
    limits = [(each.trials, each.budget) if each else None for each in searches]
    return limits[0] == limits[1] and _budget(run.saved) == _budget(config)


def _budget(config: Config) -> list[Any]:
    plain = to_plain(config)
    return [plain["train"][key.removeprefix("train.")] for key in BUDGET]
