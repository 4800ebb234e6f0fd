"""Checkpoints of a run in progress: copied at once, written in the background, then thinned."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version

import torch

from raytune_ft.checkpoints.store import CheckpointFacts, CheckpointStore
from raytune_ft.config.schema import CheckpointConfig
from raytune_ft.model.methods import Exporter
from raytune_ft.records import EvalMetrics
from raytune_ft.train.engine import Engine
from raytune_ft.train.state import Progress, Snapshot, take_snapshot, write_snapshot

PACKAGES = ("raytune_ft", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Identity:
    """What every manifest of a run says of the run."""

    config_sha256: str
    method: str
    metric: str
    mode: str


class Saver:
    """Rank 0 writes, one checkpoint at a time; on the other ranks everything but the copy is idle.

    A failed write surfaces in the next `save` or `wait`.
    """

    def __init__(
        self,
        store: CheckpointStore,
        identity: Identity,
        settings: CheckpointConfig,
        engine: Engine,
        exporter: Exporter,
    ) -> None:
        self.store, self.identity, self.settings = store, identity, settings
        self.engine, self.exporter = engine, exporter
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        evaluation: EvalMetrics | None,
    ) -> None:
        """Copy the state of all ranks, then write it; every rank must call this.

        `evaluation` is the one of this very step, if there was one; retention ranks by it.
        """
        self.wait()
        snapshot = take_snapshot(self.engine, optimizer, progress)
        if snapshot is None:
            return
        self._pending = self._pool.submit(self._write, snapshot, evaluation)
        if not self.settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until what was saved last is committed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Wait for the last write; a failure of an earlier one is not raised twice."""
        self._pool.shutdown(wait=True)

    def _write(self, snapshot: Snapshot, evaluation: EvalMetrics | None) -> None:
        progress = snapshot.progress
        scores = (
            {k: v for k, v in asdict(evaluation).items() if isinstance(v, float)}
            if evaluation
            else {}
        )
        facts = CheckpointFacts(
            examples=progress.examples,
            config_sha256=self.identity.config_sha256,
            method=self.identity.method,
            eval_loss=scores.get("eval_loss"),
            metrics=scores,
            versions={package: version(package) for package in PACKAGES},
        )
        write = partial(write_snapshot, snapshot, self.exporter)
        self.store.commit(progress.step, write, facts)
        self.store.retain(
            self.settings.keep_last,
            self.settings.keep_best,
            self.identity.mode,  # type: ignore[arg-type]
            protect=_referred(progress),
            metric=self.identity.metric,
        )


def _referred(progress: Progress) -> Collection[str]:
    return [progress.best.checkpoint] if progress.best and progress.best.checkpoint else []
