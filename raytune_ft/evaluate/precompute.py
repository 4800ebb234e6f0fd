"""What one model computes on the training examples before training: the losses of the base for a
curriculum, and a teacher's logits for `train.kd.cache: disk`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.rules import objectives_of
from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.data.order import Numbers
from raytune_ft.data.prepared import PreparedData, derived, open_prepared
from raytune_ft.data.report import DataReport
from raytune_ft.data.split import PARTS, TokenizedSplit
from raytune_ft.data.teacher_logits import Part, with_base_loss, with_teacher_logits, write_logits
from raytune_ft.errors import OutOfMemory, StorageError, first_line
from raytune_ft.evaluate.columns import batches, columns_of, label_columns_of
from raytune_ft.evaluate.context import runner_of
from raytune_ft.evaluate.workers import HERE, Workers, whole
from raytune_ft.files import sha256_of
from raytune_ft.layout import reference_file
from raytune_ft.locks import WAIT, Wait, locked
from raytune_ft.model.hub import reference_model, teacher_model
from raytune_ft.model.load import (
    Precision,
    base_file_hashes,
    disk_dtype,
    dtype_of,
    load_model_config,
    load_tokenizer,
    resolve_model_path,
)
from raytune_ft.model.objectives import TokenObjective
from raytune_ft.records import Tell
from raytune_ft.strategy import Strategy
from raytune_ft.strategy.single import Single
from raytune_ft.train.distill import LogitsFile, in_gib, logits_file, teacher_runner
from raytune_ft.train.model_runner import ModelRunner


def rated(config: Config, data: PreparedData, tell: Tell, workers: Workers = HERE) -> PreparedData:
    """The data with the base's loss on each training example, where the curriculum goes by it.

    The losses are computed once for all runs over these data and this base.

    Raises:
        ModelError: the base cannot be loaded.
        StorageError: the losses cannot be written.
    """
    curriculum, model = config.data.curriculum, config.model
    if curriculum is None or curriculum.by != "base_loss":
        return data

    def measure(split: TokenizedSplit) -> Numbers:
        tell(f"data.curriculum: the base's loss on {len(split):,} training examples")
        return workers.each(_base_losses, [(model, data.path)])[0]

    facts = [model.path, model.revision] if not (files := base_file_hashes(model)) else files
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return with_base_loss(data, digest, measure)


def _base_losses(base_on: tuple[ModelConfig, Path], strategy: Strategy) -> Numbers:
    """The mean loss of each training example of these data."""
    model, data_dir = base_on
    train = open_prepared(data_dir).train
    split = replace(train, columns={k: v for k, v in train.columns.items() if k == PARTS})
    runner = runner_of(model, load_tokenizer(model), strategy=strategy)
    columns = columns_of(runner, TokenObjective(), split)
    return columns["loss"] / columns["tokens"]


REFERENCE_BLOCK = 4096
"""Examples whose log-probabilities are computed before they are written, so that a pass which was
interrupted goes on behind them."""


def referenced(
    config: Config,
    data: PreparedData,
    tell: Tell,
    accept: Callable[[DataReport], object] = lambda report: None,
    workers: Workers = HERE,
    measured: bool = False,
) -> PreparedData:
    """The data with the log-probabilities of all label tokens under the reference, where the
    objective, or that of a trial, needs one.

    The reference computes as a run of this config does at its start, or, `measured`, as models do
    that promotion measures: rounding would otherwise count as a preference. They are computed once
    for all that compute alike. `accept` may refuse the data by raising, before that.

    Raises:
        ModelError: the reference cannot be loaded.
        StorageError: they cannot be written.
    """
    if not any(OBJECTIVES[name].reference for name in objectives_of(config)):
        return data
    model, precision = reference_model(config), config.train.precision
    sha256 = _sha256(model, "reference")
    accept(replace(data.report, reference=sha256))
    if measured:
        computes = disk_dtype(model), whole().precision
    else:
        computes = dtype_of(model, config.method, precision), precision
    key = f"{sha256} {computes[0]} {'autocast' if computes[1] == 'bfloat16' else 'plain'}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    blocks = data.path.with_name(f".reference-{digest[:16]}-{data.path.name[:16]}")

    def add(folder: Path) -> dict[str, object]:
        tell(f"the reference {model.path} computes the log-probabilities of every answer once")
        blocks.mkdir(parents=True, exist_ok=True)
        workers.each(_reference_logps, [(model, computes, data.path, blocks)])
        files = {}
        for name in data.all_splits:
            parts = [np.load(path) for path in sorted(blocks.glob(f"{name}-*.npy"))]
            np.save(folder / reference_file(name), np.concatenate(parts))
            files[name] = sha256_of(folder / reference_file(name))
        return {"reference": sha256, "reference_files": files}

    waits = "has a reference pass of another process"
    with locked(blocks.with_suffix(".lock"), waits, WAIT, Wait(math.inf, tell)):
        kept = derived(data, digest, add)
        shutil.rmtree(blocks, ignore_errors=True)
    return kept


def _reference_logps(
    job: tuple[ModelConfig, tuple[torch.dtype, Precision], Path, Path], strategy: Strategy
) -> None:
    """Write the log-probabilities of each block of each split that is not there yet."""
    model, computes, data_dir, folder = job
    data = open_prepared(data_dir)
    todo = [
        (name, np.arange(start, min(start + REFERENCE_BLOCK, len(split))))
        for name, split in data.all_splits.items()
        for start in range(0, len(split), REFERENCE_BLOCK)
    ]
    paths = [folder / f"{name}-{indices[0]:012d}.npy" for name, indices in todo]
    left = strategy.from_rank0([not path.is_file() for path in paths])
    if not any(left):
        return
    runner = runner_of(model, load_tokenizer(model), strategy=strategy, computes=computes)
    for path, (name, indices), needed in zip(paths, todo, left, strict=True):
        if not needed:
            continue
        logps_N = label_columns_of(runner, data.all_splits[name], indices)
        if strategy.rank == 0:
            unfinished = path.with_suffix(".new")
            with unfinished.open("wb") as file:
                np.save(file, logps_N.astype(np.float32))
            unfinished.rename(path)


TELL_EVERY_S = 10.0


def taught(
    config: Config,
    data: PreparedData,
    tell: Tell,
    accept: Callable[[DataReport], object] = lambda report: None,
    workers: Workers = HERE,
) -> PreparedData:
    """The data with the teacher's logits, under `train.kd.cache: disk`.

    The logits are computed once for all runs over these data and this teacher.
    `accept` may refuse the data by raising, before anything is computed.

    Raises:
        ModelError: the teacher cannot be loaded.
        StorageError: the disk has no room for the logits.
        OutOfMemory: the teacher does not fit on a worker.
    """
    file = logits_file(config, data)
    if file is None:
        return data
    model, precision = teacher_model(config), config.train.precision
    tell(f"train.kd: looking for the logits of {model.path}")
    sha256 = _sha256(model, precision)
    accept(replace(data.report, teacher=sha256))

    def write(path: Path) -> None:
        _check_room(data.path.parent, file)
        tell(f"train.kd: the teacher runs once, and {file} of its logits are written")
        if not workers.alone(_write_logits, config, data.path, path, file.width, tell=tell):
            tell(f"train.kd: the teacher's logits are wider than {precision}, and were rounded")

    kept = with_teacher_logits(data, sha256, write)
    tell(f"train.kd: the teacher's logits are in {kept.path}")
    return kept


def _write_logits(config: Config, data_dir: Path, path: Path, width: int, tell: Tell) -> bool:
    """Let the teacher run over these data. Whether no logit was rounded. Raises OutOfMemory."""
    precision, train = config.train.precision, open_prepared(data_dir).train
    runner = teacher_runner(config, Single(config.parallel, precision))
    try:
        return write_logits(path, train, width, precision, _parts(runner, train, tell))
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the teacher {teacher_model(config).path}: {first_line(error)}"
        ) from error
    finally:
        del runner
        if torch.cuda.is_available():  # workers on this machine need its memory
            torch.cuda.empty_cache()


def _sha256(model: ModelConfig, use: str) -> str:
    """Hash of a model's files, or of its commit on the hub, of how it computes, and of what makes
    the same model's numbers differ: a teacher's precision, or that it is a reference.
    """
    local = Path(resolve_model_path(model.path)).is_dir()
    commit = getattr(load_model_config(model), "_commit_hash", None)
    content = {
        "model": base_file_hashes(model) if local else [model.path, commit],
        "computes": [use, model.dtype, model.attention],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_room(folder: Path, file: LogitsFile) -> None:
    free = shutil.disk_usage(folder).free
    if file.bytes > free:
        raise StorageError(
            str(folder),
            f"has {in_gib(free)} GiB free, and train.kd.cache=disk keeps {file}",
            "write a storage with room, or train.kd.cache: memory",
        )


@torch.no_grad()
def _parts(runner: ModelRunner, split: TokenizedSplit, tell: Tell) -> Iterator[Part]:
    done, told = 0, time.monotonic()
    for _, batch in batches(runner, split):
        counts = split.labels_of(batch.indices).tolist()
        yield from zip(batch.indices, runner.logits(batch).split(counts), strict=True)
        done += len(batch.indices)
        if time.monotonic() - told >= TELL_EVERY_S:
            told = time.monotonic()
            tell(f"train.kd: the teacher's logits on {done:,} of {len(split):,} examples")
