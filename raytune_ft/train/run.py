"""One run, in each of its processes: build in one visible chain, train, leave a result."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from raytune_ft.checkpoints.store import CheckpointStore, step_name
from raytune_ft.config.identity import config_sha256
from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import PreparedData, open_prepared
from raytune_ft.errors import (
    CheckpointError,
    ConfigError,
    Diverged,
    ModelError,
    OutOfMemory,
    RaytuneFtError,
)
from raytune_ft.model.build import disk_dtype, load_tokenizer, pad_token
from raytune_ft.model.checkpointing import checkpoint_activations
from raytune_ft.model.export import Exporter
from raytune_ft.model.methods import trained_parameters
from raytune_ft.model.probe import is_causal, probe_packing
from raytune_ft.model.skeleton import Built, build
from raytune_ft.records import Point, RunResult
from raytune_ft.rundir import CHECKPOINTS, METRICS
from raytune_ft.strategy import STRATEGIES, Strategy
from raytune_ft.train.ended import ended_result, write_result
from raytune_ft.train.engine import Engine, choose_micro_tokens
from raytune_ft.train.heartbeat import watched
from raytune_ft.train.host import Host, own_host
from raytune_ft.train.loop import Objective, Schedule, train
from raytune_ft.train.optim import build_optimizer
from raytune_ft.train.report import MetricsFile, Reporter, Silent
from raytune_ft.train.saver import Identity, Saver
from raytune_ft.train.spec import RunSpec
from raytune_ft.train.state import Progress, load_state


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
    built = build(
        config.model, config.method, config.train.precision, config.seed, strategy.takes_parts
    )
    _check_vocabulary(built.model, data)
    exporter = Exporter(built.model, disk_dtype(config.model))
    engine = build_engine(built, config, strategy)
    store = CheckpointStore(spec.run_dir / CHECKPOINTS)
    schedule = Schedule.of(config.train, len(data.train), config.checkpoint.every_examples)
    checkpoint = _where_to_resume(store, schedule, strategy)
    progress = load_state(checkpoint, strategy, engine.names) if checkpoint else Progress()
    saver = Saver(
        store,
        Identity(config_sha256(config), config.method.name, spec.metric, spec.mode),
        config.checkpoint,
        engine,
        exporter,
    )
    writes = strategy.rank == 0
    resume_step = progress.step if checkpoint else None
    log = MetricsFile(spec.run_dir / METRICS, resume_step) if writes else Silent()
    alone = host is None and strategy.world_size == 1
    with (
        own_host(spec) if alone else nullcontext(host or Host()) as near,
        watched(near.heart, strategy.rank, config.parallel.hang_timeout_s, near.on_hang),
    ):
        saver.alive = near.heart.alive
        status, progress = train(
            engine,
            data.train,
            data.validation,
            config.train,
            schedule,
            config.seed,
            Objective(spec.metric, spec.mode),
            progress,
            saver,
            log,
            reporter,
            near.should_stop,
            near.heart,
        )
    saver.close()
    result = RunResult(
        status=status,
        base=asdict(progress.base) if progress.base else None,
        best=progress.best,
        final=_with_checkpoint(progress, store),
        seed=config.seed,
        config_sha256=config_sha256(config),
        notes=engine.notes,
    )
    if writes and (status != "interrupted" or host is None):
        write_result(spec.run_dir, result)
    return result


def _check_vocabulary(model: nn.Module, data: PreparedData) -> None:
    rows: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    splits = (data.train, data.validation, data.test)
    largest = max(int(split.input_ids.max(initial=0)) for split in splits if split is not None)
    if largest >= rows:
        raise ModelError(
            "model.path",
            f"has embeddings for {rows} tokens, and its tokenizer writes token {largest}",
            "use the tokenizer that belongs to the model, or resize the model's embeddings",
        )


def _where_to_resume(store: CheckpointStore, schedule: Schedule, strategy: Strategy) -> Path | None:
    """The newest sound checkpoint through which a run of this budget passes.

    Rank 0 looks, since ranks on several hosts may not see the same folder at the same moment. Then
    every rank verifies a share of its files: a large one takes long to read.
    """
    names = [
        path.name
        for path, manifest in reversed(store.list())
        if strategy.rank == 0 and schedule.is_on_the_way(manifest.step, manifest.examples)
    ]
    for name in strategy.agree(names):
        damaged = torch.zeros(1, device=strategy.device)
        try:
            store.verify(store.root / name, strategy.rank, strategy.world_size)
        except CheckpointError as error:
            logging.getLogger(__name__).warning(f"checkpoint {name} is passed over: {error}")
            damaged += 1
        if strategy.sum(damaged).item() == 0:
            return store.root / name
    return None


def build_engine(built: Built, config: Config, strategy: Strategy) -> Engine:
    """Lay the model out as the strategy does, then ask whether packing is exact on it.

    Raises:
        ConfigError: `data.packing: true` and packing would change the numbers.
        ModelError: tokens see those after them.
    """
    model = built.model
    head = model.get_output_embeddings()  # type: ignore[operator]
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    names = list(trained_parameters(model))
    checkpoint_activations(model, config.parallel.activation_checkpointing)
    wrapped = strategy.prepare(model, partial(build_optimizer, train=config.train))
    if built.weights is not None:
        built.weights.fill({n: strategy.part(n, p.detach()) for n, p in model.named_parameters()})
    engine = Engine(
        model=model,
        wrapped=wrapped,
        head=head,
        names=names,
        strategy=strategy,
        precision=config.train.precision,
        pad_token=min(pad_token(load_tokenizer(config.model)), vocabulary - 1),
        micro_tokens=choose_micro_tokens(config.train.micro_tokens, strategy.device),
        packing=False,
        notes=built.notes,
    )
    asked = (engine.logits, vocabulary, engine.precision, strategy.device)
    if not strategy.agree(is_causal(*asked)):
        raise ModelError(
            f"model.path={config.model.path}",
            "lets tokens see those after them, which they are to predict",
            'write a decoder; a BERT is one with "is_decoder": true in its config.json',
        )
    if config.data.packing is False:
        return engine
    reason = strategy.agree(probe_packing(*asked))
    if reason is None:
        return replace(engine, packing=True)
    if config.data.packing is True:
        raise ConfigError("data.packing=true", f"would change the numbers: {reason}", "write auto")
    without = f"data.packing: auto goes without, because {reason}"
    return replace(engine, notes=(*engine.notes, without))


def _with_checkpoint(progress: Progress, store: CheckpointStore) -> Point | None:
    if progress.final is None:
        return None
    name = step_name(progress.final.step)
    kept = (store.root / name).is_dir()
    return replace(progress.final, checkpoint=f"checkpoints/{name}" if kept else None)


def _as_failure(error: BaseException) -> RaytuneFtError | None:
    """Errors that are a result of the run; None for bugs and for a lost peer."""
    if isinstance(error, RaytuneFtError):
        return error
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if out_of_memory or "can't allocate memory" in str(error):
        return OutOfMemory(str(error).splitlines()[0] if str(error) else "out of memory")
    return None
