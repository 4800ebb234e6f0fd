"""One run, in each of its processes: build in one visible chain, train, leave a result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial

import torch

from raytune_ft.checkpoints.store import CheckpointStore
from raytune_ft.config.identity import config_sha256
from raytune_ft.data.prepare import open_prepared
from raytune_ft.errors import Diverged, OutOfMemory, RaytuneFtError
from raytune_ft.layout import CHECKPOINTS
from raytune_ft.model.export import Exporter
from raytune_ft.model.load import disk_dtype
from raytune_ft.model.meta import BaseFiles, build
from raytune_ft.model.methods import paces
from raytune_ft.records import RunResult
from raytune_ft.strategy import STRATEGIES, Strategy
from raytune_ft.train.checkpoint import Identity, Progress, Saver, load_state
from raytune_ft.train.loop import train
from raytune_ft.train.optim import build_optimizer
from raytune_ft.train.report import Reporter, Silent
from raytune_ft.train.result import ended_result, run_result, write_result
from raytune_ft.train.run_state import Goal, Schedule
from raytune_ft.train.setup import (
    build_engine,
    build_objective,
    check_vocabulary,
    head_of,
    order_of,
    where_to_resume,
)
from raytune_ft.train.spec import RunSpec
from raytune_ft.train.trackers import Log
from raytune_ft.train.watchdog import Host, own_host, watched


def run_training(
    spec: RunSpec, strategy_name: str, reporter: Reporter, host: Host | None = None
) -> RunResult:
    """Train one run to its end, from the newest sound checkpoint in `spec.run_dir` if there is one.

    Called in every process of the run, after `torch.distributed` was set up where the strategy
    needs it. Rank 0 keeps `metrics.jsonl` and leaves `result.json`. A failure that all ranks see
    alike is a result with status "failed"; one that this rank alone may have met is raised, so
    that whoever started the group ends the others, which wait for this one.

    `host` is whoever started this process. It knows why it asked the run to stop, so that it and
    not the run writes the result "interrupted". Without one, a single process listens to signals.

    Raises:
        InputError: the input turns out to be wrong only now; `result.json` says so too.
        RunFailed: this rank failed and there are others.
    """
    strategy = STRATEGIES[strategy_name](spec.config.parallel, spec.config.train.precision)
    try:
        return _train(spec, strategy, reporter, host)
    except (RaytuneFtError, MemoryError, RuntimeError) as error:
        failure = _as_failure(error)
        if failure is None:
            raise
        result = ended_result(spec, "failed", f"{type(failure).__name__}: {failure}")
        if strategy.rank == 0:
            write_result(spec.run_dir, result)
        alone = strategy.world_size == 1 and failure.exit_code == 1
        if alone or isinstance(failure, Diverged):
            return result
        raise failure from error


def _train(spec: RunSpec, strategy: Strategy, reporter: Reporter, host: Host | None) -> RunResult:
    config = spec.config
    data = open_prepared(spec.data_dir)
    head = head_of(config, data.report)
    built = build(
        config.model, config.method, config.train.precision, config.seed, strategy.takes_parts, head
    )
    check_vocabulary(built.model, data)
    frozen = BaseFiles(config.model, head) if config.method.name == "freeze" else None
    exporter = Exporter(built.model, disk_dtype(config.model, head), frozen)
    optimizer_of = partial(
        build_optimizer, train=config.train, paces=paces(built.model, config.method)
    )
    objective = build_objective(config, data, strategy)
    engine = build_engine(built, config, strategy, optimizer_of, objective)
    store = CheckpointStore(spec.run_dir / CHECKPOINTS)
    order = order_of(config, data)
    schedule = Schedule.of(
        config.train, len(order), config.checkpoint.every_examples, config.data.curriculum
    )
    checkpoint = where_to_resume(store, schedule, strategy)
    progress = load_state(checkpoint, strategy, engine.names) if checkpoint else Progress()
    pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    saver = Saver(
        store,
        Identity(config_sha256(config), config.method.name, spec.metric, spec.mode),
        config.checkpoint,
        strategy,
        engine.names,
        exporter,
        pool,
    )
    writes = strategy.rank == 0
    resume_step = progress.step if checkpoint else None
    log = Log(spec, resume_step) if writes else None
    alone = host is None and strategy.world_size == 1
    with (
        closing(log) if log else nullcontext(),
        own_host(spec) if alone else nullcontext(host or Host()) as near,
        watched(near.heart, strategy.rank, config.parallel.hang_timeout_s, near.on_hang),
    ):
        saver.alive = near.heart.alive
        status, progress = train(
            engine,
            data.train,
            order,
            data.validation,
            config.train,
            schedule,
            config.seed,
            Goal(spec.metric, spec.mode),
            progress,
            saver,
            log or Silent(),
            reporter,
            near.should_stop,
            near.heart,
        )
    pool.shutdown(wait=True)
    result = run_result(status, progress, spec.run_dir, config, engine.notes)
    if writes and (status != "interrupted" or host is None):
        write_result(spec.run_dir, result)
    return result


def _as_failure(error: BaseException) -> RaytuneFtError | None:
    """Errors that are a result of the run; None for bugs and for a lost peer."""
    if isinstance(error, RaytuneFtError):
        return error
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if out_of_memory or "can't allocate memory" in str(error):
        return OutOfMemory(str(error).splitlines()[0] if str(error) else "out of memory")
    return None
