"""Checkpoints of a run in progress: copied at once, written in the background, then thinned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Executor, Future, wait
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raytune_ft.checkpoints.store import CheckpointFacts, CheckpointStore
from raytune_ft.config.schema import CheckpointConfig
from raytune_ft.errors import CheckpointError
from raytune_ft.files import flush_file, read_json
from raytune_ft.layout import OPTIMIZER, PROGRESS, STATE, WEIGHTS, shard_name
from raytune_ft.model.export import Exporter
from raytune_ft.records import EvalMetrics, FileRecord, Point, to_json
from raytune_ft.strategy.exchange import Exchange, together
from raytune_ft.tensors.read import TensorFiles, open_shards
from raytune_ft.tensors.write import Part, ignore, write_parts


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` optimizer steps.

    `unimproved` counts the evaluations in a row that did not improve on `best`.
    """

    step: int = 0
    examples: int = 0
    wall_s: float = 0.0
    base: EvalMetrics | None = None
    best: Point | None = None
    final: Point | None = None
    unimproved: int = 0


class Holder(Protocol):
    """Whose weights and moments are saved and loaded; a `Strategy` is one, see there."""

    @property
    def device(self) -> torch.device:
        """Where the parts are."""

    def start_from(self, step: int) -> None:
        """See `Strategy.start_from`."""

    def parts(self, name: str) -> dict[str, Part]:
        """See `Strategy.parts`."""

    def loaded(self) -> None:
        """See `Strategy.loaded`."""

    def exchange(self) -> Exchange:
        """See `Strategy.exchange`."""


@dataclass(frozen=True)
class Snapshot:
    """A copy in host memory of what this rank saves; training may go on while it is written."""

    weights: dict[str, Part]
    moments: dict[str, Part]
    progress: Progress


class SnapshotTaker:
    """Copies into the same memory each time: the first touch of new pages costs more than a copy.

    So a snapshot must be written before the next one is taken.
    """

    def __init__(self, holder: Holder, names: list[str]) -> None:
        self._holder, self._names = holder, names
        self._memory: dict[str, Tensor] = {}

    def take(self, progress: Progress) -> Snapshot:
        """Nothing is sent between ranks."""
        weights: dict[str, Part] = {}
        moments: dict[str, Part] = {}
        for name in self._names:
            for moment, part in self._holder.parts(name).items():
                if part.writes:
                    key = f"{name}.{moment}" if moment else name
                    kept = moments if moment else weights
                    kept[key] = replace(part, values=self._copy(key, part.values))
        if self._holder.device.type == "cuda":
            torch.cuda.synchronize()
        return Snapshot(weights, moments, progress)

    def _copy(self, key: str, values: Tensor) -> Tensor:
        memory = self._memory.get(key)
        if memory is None or memory.shape != values.shape:
            pinned = self._holder.device.type == "cuda"
            memory = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
            self._memory[key] = memory
        return memory.copy_(values, non_blocking=True)


def write_state(
    snapshot: Snapshot,
    directory: Path,
    rank: int,
    world_size: int,
    wrote: Callable[[int], None] = ignore,
) -> list[FileRecord]:
    """Add this rank's files to a checkpoint's directory; rank 0 adds the JSON."""
    (directory / STATE).mkdir(exist_ok=True)
    records = [
        write_parts(directory, f"{STATE}/{shard_name(stem, rank, world_size)}", parts, wrote)
        for stem, parts in ((WEIGHTS, snapshot.weights), (OPTIMIZER, snapshot.moments))
    ]
    if rank == 0:
        path = directory / STATE / PROGRESS
        path.write_text(to_json(snapshot.progress, indent=2), encoding="utf-8")
        records.append(flush_file(path, directory))
    return records


def read_progress(checkpoint: Path) -> Progress:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or lacks what this version needs.
    """
    path = checkpoint / STATE / PROGRESS
    try:
        content = read_json(path)
        kinds = {"base": EvalMetrics, "best": Point, "final": Point}
        records = {key: _record(kind, content[key]) for key, kind in kinds.items()}
        progress: Progress = _record(Progress, content | records)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    return progress


def load_state(checkpoint: Path, holder: Holder, names: list[str]) -> Progress:
    """Put a checkpoint's weights and moments into a freshly built model and optimizer.

    Every rank reads its own parts.

    Raises:
        CheckpointError: it is of another model or method.
    """
    progress = read_progress(checkpoint)
    holder.start_from(progress.step)
    state = checkpoint / STATE
    with open_shards(state, WEIGHTS) as weights, open_shards(state, OPTIMIZER) as moments:
        _check_names(checkpoint, set(weights.shapes), names)
        for name in names:
            for moment, part in holder.parts(name).items():
                source, key = (moments, f"{name}.{moment}") if moment else (weights, name)
                _fill(checkpoint, part, source, key)
    holder.loaded()
    return progress


def _fill(checkpoint: Path, part: Part, source: TensorFiles, key: str) -> None:
    found = source.shapes.get(key)
    if found != part.shape:
        raise CheckpointError(
            f"{checkpoint} holds {key} with shape {found}, the model built has {part.shape}"
        )
    source.fill(part, key)


def _check_names(checkpoint: Path, saved: set[str], built: list[str]) -> None:
    if saved != set(built):
        odd = sorted(saved ^ set(built))
        raise CheckpointError(
            f"{checkpoint} is of another model or method: {len(odd)} of {len(built)} trained "
            f"weights differ, among them {odd[0]}"
        )


def _record(kind: type[Any], content: dict[str, Any] | None) -> Any:
    if content is None:
        return None
    known = {field.name for field in fields(kind)}
    return kind(**{key: value for key, value in content.items() if key in known})


PACKAGES = ("raytune_ft", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Identity:
    """What every manifest of a run says of the run."""

    config_sha256: str
    method: str
    metric: str
    mode: str


class Saver:
    """Every rank copies what it holds and goes on; a thread of each writes one snapshot at a time.

    `pool` has that one thread, which may serve the savers of several runs in turn. A failed write,
    of whichever rank, surfaces on all of them in the next `save` or `wait`.
    """

    def __init__(
        self,
        store: CheckpointStore,
        identity: Identity,
        settings: CheckpointConfig,
        holder: Holder,
        names: list[str],
        exporter: Exporter,
        pool: Executor,
    ) -> None:
        self.store, self.identity, self.settings = store, identity, settings
        self.exporter = exporter
        self._line = holder.exchange()
        self._taker = SnapshotTaker(holder, names)
        self._pool = pool
        self._pending: Future[None] | None = None
        self._written = self._seen = 0
        self.alive: Callable[[], None] = lambda: None

    def save(self, progress: Progress, evaluation: EvalMetrics | None) -> None:
        """Copy the state, then write it; every rank must call this.

        `evaluation` is the one of this very step, if there was one; retention ranks by it.
        """
        self.wait()
        self._pending = self._pool.submit(self._write, self._taker.take(progress), evaluation)
        if not self.settings.asynchronous:
            self.wait()

    @property
    def pending(self) -> bool:
        """Was something saved that nobody has waited for yet? Alike on all ranks."""
        return self._pending is not None

    @property
    def busy(self) -> bool:
        """Is a checkpoint being written?"""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Until what was saved last is committed.

        `alive` is told meanwhile, as long as bytes are written here or other ranks are waited for,
        whose own signs of life are theirs to give.
        """
        if self._pending is None:
            return
        while not wait([self._pending], timeout=1.0).done:
            if self._line.waiting or self._written > self._seen:
                self._seen = self._written
                self.alive()
        pending, self._pending = self._pending, None
        pending.result()

    def _wrote(self, count: int) -> None:
        self._written += count

    def _write(self, snapshot: Snapshot, evaluation: EvalMetrics | None) -> None:
        """All ranks at once, step by step; where one fails, all of them do."""
        line, step, first = self._line, snapshot.progress.step, self._line.rank == 0
        facts = self._facts(snapshot.progress, evaluation)
        folder = together(line, lambda: self.store.begin(step, facts) if first else None)[0]
        if folder is None:
            return
        try:
            ours = partial(write_state, snapshot, folder, line.rank, line.world_size, self._wrote)
            states = together(line, ours)
            exports = together(line, partial(self._export, folder))
            files = chain.from_iterable([*states, *exports])
            together(line, lambda: self._finish(folder, facts, snapshot, files) if first else None)
        finally:
            if first:
                self.store.drop(folder)

    def _export(self, folder: Path) -> list[FileRecord]:
        """From the files that all ranks have just written, so that nothing is sent between them."""
        with open_shards(folder / STATE, WEIGHTS) as weights:
            line = self._line
            return self.exporter.save(
                weights.whole, folder, line.rank, line.world_size, self._wrote
            )

    def _facts(self, progress: Progress, evaluation: EvalMetrics | None) -> CheckpointFacts:
        scores = asdict(evaluation) if evaluation else {}
        scores = {key: value for key, value in scores.items() if isinstance(value, float)}
        return CheckpointFacts(
            examples=progress.examples,
            config_sha256=self.identity.config_sha256,
            method=self.identity.method,
            eval_loss=scores.get("eval_loss"),
            metrics=scores,
            versions={package: version(package) for package in PACKAGES},
        )

    def _finish(
        self, folder: Path, facts: CheckpointFacts, snapshot: Snapshot, files: Iterable[FileRecord]
    ) -> None:
        progress = snapshot.progress
        self.store.finish(folder, progress.step, facts, files)
        try:
            self.store.retain(
                self.settings.keep_last,
                self.settings.keep_best,
                self.identity.mode,  # type: ignore[arg-type]
                protect=_referred(progress),
                metric=self.identity.metric,
                keep_every_examples=self.settings.keep_every_examples,
            )
        except OSError as error:  # the new checkpoint is there all the same
            logging.getLogger(__name__).warning(f"old checkpoints are kept: {error}")


def _referred(progress: Progress) -> Collection[str]:
    return [progress.best.checkpoint] if progress.best and progress.best.checkpoint else []
