"""Checkpoints of a run in progress: copied at once, written in the background, then thinned."""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from itertools import accumulate, chain
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from raytune_ft.checkpoints.store import CheckpointFacts, CheckpointStore
from raytune_ft.config.identity import config_sha256
from raytune_ft.errors import CheckpointError
from raytune_ft.files import flush_file, read_json
from raytune_ft.layout import OPTIMIZER, PROGRESS, ROLLOUT, STATE, WEIGHTS, shard_name
from raytune_ft.model.export import Exporter
from raytune_ft.records import EvalMetrics, FileRecord, Point, Progress, to_json
from raytune_ft.rundir import RunSpec
from raytune_ft.strategy.side_channel import SideChannel, on_all_ranks
from raytune_ft.tensors.read import TensorFiles, open_shards
from raytune_ft.tensors.write import Part, write_parts


class Holder(Protocol):
    """Holds the weights and moments that are saved and loaded: a `Strategy`, or a packed slot.

    The methods are those of `Strategy`.
    """

    @property
    def device(self) -> torch.device:
        """The device of the parts."""

    def start_from(self, step: int) -> None: ...

    def parts(self, name: str) -> dict[str, Part]: ...

    def loaded(self) -> None: ...

    def side_channel(self) -> SideChannel: ...


@dataclass(frozen=True)
class Snapshot:
    """A copy in host memory of what this rank saves; training continues while it is written.

    `rollout` is what has been sampled for steps to come; rank 0 writes it.
    """

    weights: dict[str, Part]
    moments: dict[str, Part]
    progress: Progress
    rollout: Mapping[str, Tensor] = field(default_factory=dict)


ALIGNED = 64
"""Bytes: where a part begins in the memory of a snapshot."""


class SnapshotTaker:
    """Copies into the same memory each time: the first touch of new pages costs more than a copy.

    All parts lie in one piece of memory. A snapshot must be written before the next one is taken.
    """

    def __init__(self, holder: Holder, names: list[str]) -> None:
        self._holder, self._names = holder, names
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, progress: Progress) -> Snapshot:
        """Copy this rank's parts. No rank waits for another."""
        found = [
            (name, moment, part)
            for name in self._names
            for moment, part in self._holder.parts(name).items()
            if part.writes
        ]
        sizes = [part.values.nbytes for *_, part in found]
        starts = list(accumulate((-(-size // ALIGNED) * ALIGNED for size in sizes), initial=0))
        if starts[-1] > len(self._memory):
            self._memory = host_memory(starts[-1], self._holder.device)
        weights: dict[str, Part] = {}
        moments: dict[str, Part] = {}
        for (name, moment, part), start, size in zip(found, starts, sizes, strict=False):
            copy = self._memory[start : start + size].view(part.values.dtype)
            copy.copy_(part.values, non_blocking=True)
            kept = moments if moment else weights
            kept[f"{name}.{moment}" if moment else name] = replace(part, values=copy)
        if self._holder.device.type == "cuda":
            torch.cuda.synchronize()
        return Snapshot(weights, moments, progress)


def host_memory(size: int, device: torch.device) -> Tensor:
    """`[size]` bytes of host memory; page-locked where `device` is a GPU, which copies into such
    memory without waiting.

    Not by `pin_memory`, which takes the next power of two and never gives memory back.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    page = mmap.PAGESIZE
    whole = torch.empty(size + 2 * page, dtype=torch.uint8)
    start = -whole.data_ptr() % page  # whole pages, since a page is locked once
    memory = whole[start : start + -(-size // page) * page]
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), len(memory), 0))
    # Before the memory is freed: the storage is, once nothing refers to it any more.
    storage, at = memory.untyped_storage(), memory.data_ptr()
    unlocked = weakref.finalize(storage, runtime.cudaHostUnregister, at)
    unlocked.atexit = False  # the process gives all of it back
    return memory


def write_state(
    snapshot: Snapshot,
    directory: Path,
    rank: int,
    world_size: int,
    wrote: Callable[[int], None],
) -> list[FileRecord]:
    """Write this rank's files into a checkpoint's directory; rank 0 adds the JSON."""
    (directory / STATE).mkdir(exist_ok=True)
    records = [
        write_parts(directory, f"{STATE}/{shard_name(stem, rank, world_size)}", parts, wrote)
        for stem, parts in ((WEIGHTS, snapshot.weights), (OPTIMIZER, snapshot.moments))
    ]
    if rank == 0:
        path = directory / STATE / PROGRESS
        path.write_text(to_json(snapshot.progress, indent=2), encoding="utf-8")
        records.append(flush_file(path, directory))
        if snapshot.rollout:
            path = directory / STATE / ROLLOUT
            save_file(dict(snapshot.rollout), path)
            records.append(flush_file(path, directory))
    return records


def read_progress(checkpoint: Path) -> Progress:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or lacks a key.
    """
    path = checkpoint / STATE / PROGRESS
    try:
        content = read_json(path)
        kinds = {"base": EvalMetrics, "best": Point, "final": Point}
        evaluations = {
            key: None if content[key] is None else kind.of(content[key])
            for key, kind in kinds.items()
        }
        known = {each.name for each in fields(Progress)} & content.keys()
        progress = Progress(**({key: content[key] for key in known} | evaluations))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    return progress


def load_state(
    checkpoint: Path, holder: Holder, names: list[str], channel: SideChannel
) -> Progress:
    """Put a checkpoint's weights and moments into a freshly built model and optimizer.

    Every rank reads its own parts. Where one rank cannot, all of them raise, so that none waits.

    Raises:
        CheckpointError: it cannot be read, or is of another model or method.
    """
    progress = on_all_ranks(channel, lambda: read_progress(checkpoint))[channel.rank]
    holder.start_from(progress.step)
    on_all_ranks(channel, lambda: _fill_parts(checkpoint, holder, names))
    holder.loaded()
    return progress


def _fill_parts(checkpoint: Path, holder: Holder, names: list[str]) -> None:
    state = checkpoint / STATE
    with open_shards(state, WEIGHTS) as weights, open_shards(state, OPTIMIZER) as moments:
        _check_names(checkpoint, set(weights.shapes), names)
        for name in names:
            for moment, part in holder.parts(name).items():
                source, key = (moments, f"{name}.{moment}") if moment else (weights, name)
                _fill(checkpoint, part, source, key)


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


PACKAGES = ("raytune_ft", "torch", "transformers", "peft", "safetensors")


class Saver:
    """Every rank copies its parts and trains on; a thread of each writes one snapshot at a time.

    `pool` has that one thread, which may serve the savers of several runs in turn. A write that
    fails on one rank raises on all of them, in the next `save` or `wait`. `alive` is called while
    `wait` waits, as long as bytes are written here or other ranks are waited for. `rollout` gives
    what a snapshot of a step has beside weights and moments, in tensors that do not change.
    """

    def __init__(
        self,
        spec: RunSpec,
        store: CheckpointStore,
        holder: Holder,
        names: list[str],
        exporter: Exporter,
        channel: SideChannel,
        pool: Executor,
        alive: Callable[[], None],
        rollout: Callable[[int], Mapping[str, Tensor]] | None,
    ) -> None:
        self._rollout = rollout
        self._spec, self._settings, self._store = spec, spec.config.checkpoint, store
        self._exporter, self._alive = exporter, alive
        self._channel = channel
        self._taker = SnapshotTaker(holder, names)
        self._pool = pool
        self._pending: Future[None] | None = None
        self._written = self._seen = 0

    def save(self, progress: Progress, evaluation: EvalMetrics | None) -> None:
        """Copy the state, and write it in the background; every rank must call this.

        `evaluation` is that of this step, None where there was none; `keep_best` ranks by it.
        """
        self.wait()
        taken = self._taker.take(progress)
        if self._rollout is not None:
            taken = replace(taken, rollout=self._rollout(progress.step))
        self._pending = self._pool.submit(self._write, taken, evaluation)
        if not self._settings.asynchronous:
            self.wait()

    @property
    def pending(self) -> bool:
        """Was a snapshot taken that `wait` has not seen committed? The same on all ranks."""
        return self._pending is not None

    @property
    def busy(self) -> bool:
        """Is a checkpoint being written on this rank?"""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Wait until the last snapshot is committed. Raises CheckpointError where it failed."""
        if self._pending is None:
            return
        while not wait([self._pending], timeout=1.0).done:
            if self._channel.waiting or self._written > self._seen:
                self._seen = self._written
                self._alive()
        pending, self._pending = self._pending, None
        pending.result()

    def _wrote(self, count: int) -> None:
        self._written += count

    def _write(self, snapshot: Snapshot, evaluation: EvalMetrics | None) -> None:
        """Write on all ranks at once, stage by stage; where one rank fails, all of them do."""
        channel, step, first = self._channel, snapshot.progress.step, self._channel.rank == 0
        facts = self._facts(snapshot.progress, evaluation)
        folder = on_all_ranks(channel, lambda: self._store.begin(step, facts) if first else None)[0]
        if folder is None:
            return
        try:
            states = on_all_ranks(channel, partial(self._write_state, snapshot, folder))
            exports = on_all_ranks(channel, partial(self._export, step, folder))
            files = chain.from_iterable([*states, *exports])
            on_all_ranks(
                channel, lambda: self._finish(folder, facts, snapshot, files) if first else None
            )
        finally:
            if first:
                self._store.drop(folder)

    def _write_state(self, snapshot: Snapshot, folder: Path) -> list[FileRecord]:
        channel = self._channel
        with self._store.writing(snapshot.progress.step):
            return write_state(snapshot, folder, channel.rank, channel.world_size, self._wrote)

    def _export(self, step: int, folder: Path) -> list[FileRecord]:
        """Export from the files that all ranks have just written, so no weight is sent."""
        channel = self._channel
        with self._store.writing(step), open_shards(folder / STATE, WEIGHTS) as weights:
            return self._exporter.save(
                weights.whole, folder, channel.rank, channel.world_size, self._wrote
            )

    def _facts(self, progress: Progress, evaluation: EvalMetrics | None) -> CheckpointFacts:
        scores = dict(evaluation.figures) if evaluation else {}
        return CheckpointFacts(
            examples=progress.examples,
            config_sha256=config_sha256(self._spec.config),
            method=self._spec.config.method.name,
            eval_loss=scores.get("eval_loss"),
            metrics=scores,
            versions={package: version(package) for package in PACKAGES},
        )

    def _finish(
        self, folder: Path, facts: CheckpointFacts, snapshot: Snapshot, files: Iterable[FileRecord]
    ) -> None:
        progress = snapshot.progress
        self._store.finish(folder, progress.step, facts, files)
        try:
            self._store.retain(
                self._settings.keep_last,
                self._settings.keep_best,
                self._spec.mode,  # type: ignore[arg-type]
                protect=_referred(progress),
                metric=self._spec.metric,
                keep_every_examples=self._settings.keep_every_examples,
            )
        except OSError as error:  # the new checkpoint is committed all the same
            logging.getLogger(__name__).warning(f"old checkpoints could not be deleted: {error}")


def _referred(progress: Progress) -> Collection[str]:
    return [progress.best.checkpoint] if progress.best and progress.best.checkpoint else []
