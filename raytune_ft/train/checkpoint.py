"""Checkpoints of a run in progress: copied at once, written in the background, then thinned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Executor, Future, wait
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

from raytune_ft.checkpoints.store import CheckpointFacts, CheckpointStore
from raytune_ft.config.schema import CheckpointConfig
from raytune_ft.model.export import Exporter
from raytune_ft.records import EvalMetrics, FileRecord
from raytune_ft.strategy.exchange import together
from raytune_ft.tensors.read import open_shards
from raytune_ft.train.state import (
    STATE,
    WEIGHTS,
    Holder,
    Progress,
    Snapshot,
    SnapshotTaker,
    write_state,
)

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
