"""One run, in each of its processes: build in one visible chain, train, leave a result."""

from __future__ import annotations

import gc
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial

import torch

from raytune_ft.config.methods import METHODS
from raytune_ft.data.prepared import open_prepared
from raytune_ft.errors import (
    ConfigError,
    Diverged,
    OutOfMemory,
    PassTooLarge,
    RaytuneFtError,
    first_line,
    is_out_of_memory,
)
from raytune_ft.model.export import Exporter
from raytune_ft.model.load import disk_dtype, head_notes, own_dtypes
from raytune_ft.model.meta import BaseFiles, build
from raytune_ft.model.methods import param_groups
from raytune_ft.records import RunResult
from raytune_ft.rundir import RunSpec
from raytune_ft.strategy import Strategy, build_strategy
from raytune_ft.strategy.numerics import without_algorithm
from raytune_ft.train.budget import lowered, lowers
from raytune_ft.train.budget import notes as budget_notes
from raytune_ft.train.copies import Sampler
from raytune_ft.train.loop import train
from raytune_ft.train.optim import build_optimizer
from raytune_ft.train.report import Reporter
from raytune_ft.train.result import end_run, failed_result
from raytune_ft.train.setup import (
    build_material,
    build_objective,
    build_run_state,
    build_runner,
    extent_of,
    head_of,
    with_critic,
)
from raytune_ft.train.stopping import Host, own_host
from raytune_ft.train.watchdog import Heartbeat, watched


def run_training(
    spec: RunSpec,
    strategy_name: str,
    reporter: Reporter,
    host: Host | None = None,
    sampler: Sampler | None = None,
) -> RunResult:
    """Train one run to its end, from the newest sound checkpoint in `spec.run_dir` if there is one.

    Called in every process of the run, after `torch.distributed` was set up where the strategy
    needs it. Rank 0 keeps `metrics.jsonl` and leaves `result.json`. A failure that all ranks see
    alike is a result with status "failed"; one that this rank alone may have met is raised, so
    that whoever started the group ends the others, which wait for this one.

    Where memory runs out in a pass, a single process starts again with smaller ones.

    `host` stands for the process that started this one. It may ask the run to stop, and then writes
    the result "interrupted" itself. Without a host, a single process listens to signals. `sampler`
    answers prompts where `train.rollout.engine` is not the model in training itself.

    Raises:
        InputError: the input turns out to be wrong only now; `result.json` says so too.
        RunFailed: this rank failed and there are others; PassTooLarge where all start again.
    """
    settings = spec.config.train
    while True:
        strategy = build_strategy(
            strategy_name, spec.config.parallel, settings.precision, settings.deterministic
        )
        try:
            return _train(spec, strategy, reporter, host, sampler)
        except PassTooLarge as error:
            if strategy.world_size > 1:
                raise
            logging.getLogger(__name__).warning("%s", error)
        except (RaytuneFtError, MemoryError, RuntimeError) as error:
            failure = _as_failure(error)
            if failure is None:
                raise
            result = failed_result(spec, failure)
            if strategy.rank == 0:
                end_run(spec, result)
            alone = strategy.world_size == 1 and failure.exit_code == 1
            if alone or isinstance(failure, Diverged):
                return result
            raise failure from error
        del strategy  # and with the exception goes what its frames held
        give_back_memory()


def give_back_memory() -> None:
    """Free what the last run in this process held, and forget its peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _train(
    spec: RunSpec,
    strategy: Strategy,
    reporter: Reporter,
    host: Host | None,
    sampler: Sampler | None,
) -> RunResult:
    config = lowered(spec.config, spec.run_dir)
    spec = replace(spec, config=config)
    data = open_prepared(spec.data_dir)
    head = head_of(config, data.report)
    built = build(
        config.model, config.method, config.train.precision, config.seed, strategy.takes_parts, head
    )
    frozen = BaseFiles(config.model, head) if METHODS[config.method.name].trains == "part" else None
    said = (*head_notes(config.model, head), *budget_notes(spec.run_dir))
    built = replace(built, notes=(*built.notes, *said))
    own = own_dtypes(config.model) if METHODS[config.method.name].whole_model else {}
    exporter = Exporter(built.model, disk_dtype(config.model, head), frozen, own)
    groups = param_groups(built.model, config.method)
    groups |= with_critic(built.model, config.train)  # after the exporter, which does not save it
    optimizer_of = partial(build_optimizer, train=config.train, groups=groups)
    objective = build_objective(config, data, strategy)
    extent, widest = extent_of(config, data)
    runner = build_runner(built, config, strategy, optimizer_of, objective, extent, widest)
    heart = host.heart if host else Heartbeat()
    pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    alone = host is None and strategy.world_size == 1
    with build_material(runner, data, spec, heart, exporter, sampler) as material:
        run = build_run_state(
            spec, data, strategy, runner.names, exporter, strategy, reporter, heart, pool, material
        )
        with closing(run):
            with (
                own_host(spec, heart) if alone else nullcontext(host or Host(heart=heart)) as near,
                watched(heart, strategy.rank, config.parallel.hang_timeout_s, near.on_hang),
            ):
                longest = widest + config.method.virtual_tokens * data.train.parts
                policy = config.parallel.activation_checkpointing
                with lowers(spec.run_dir, runner.micro_tokens, longest, policy):
                    train(runner, material, run, near)
            pool.shutdown(wait=True)  # not after a failure, where peers may be gone
            return run.finish(runner.notes, hosted=host is not None)


def _as_failure(error: BaseException) -> RaytuneFtError | None:
    """Errors that are a result of the run; None for bugs and for a lost peer."""
    if isinstance(error, RaytuneFtError):
        return error
    if (operation := without_algorithm(error)) is not None:
        return ConfigError(
            "train.deterministic=true",
            f"forbids {operation}, which has no deterministic algorithm on this device",
            "write train.deterministic: false",
        )
    return OutOfMemory(first_line(error)) if is_out_of_memory(error) else None
