"""Checkpoints of files that are not those of a run, and files that cannot grow."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raytune_ft.checkpoints.manifest import flush_files
from raytune_ft.checkpoints.store import CheckpointFacts, CheckpointStore
from raytune_ft.layout import step_name


def commit(
    store: CheckpointStore, step: int, write: Callable[[Path], object], facts: CheckpointFacts
) -> Path:
    """Store what `write(folder)` writes, as the only rank of a run does."""
    folder = store.begin(step, facts)
    if folder is None:
        return store.root / step_name(step)
    try:
        with store.writing(step):
            write(folder)
            files = list(flush_files(folder))
        return store.finish(folder, step, facts, files)
    finally:
        store.drop(folder)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Python ignores SIGXFSZ, so that a larger file raises EFBIG, much as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
