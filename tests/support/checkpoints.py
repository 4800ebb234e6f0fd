"""Checkpoints of files that are not those of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from raytune_ft.checkpoints.manifest import flush_files
from raytune_ft.checkpoints.store import CheckpointFacts, CheckpointStore
from raytune_ft.layout import step_name
from raytune_ft.strategy.side_channel import Alone, on_all_ranks


def commit(
    store: CheckpointStore, step: int, write: Callable[[Path], object], facts: CheckpointFacts
) -> Path:
    """Store what `write(folder)` writes, as the only rank of a run does."""
    folder = store.begin(step, facts)
    if folder is None:
        return store.root / step_name(step)
    try:
        on_all_ranks(Alone(), partial(write, folder))
        return store.finish(folder, step, facts, flush_files(folder))
    finally:
        store.drop(folder)
