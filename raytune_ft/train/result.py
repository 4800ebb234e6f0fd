"""`result.json` of a run that came to its end."""

from __future__ import annotations

from dataclasses import asdict, replace

from raytune_ft.checkpoints.store import CheckpointStore, step_name
from raytune_ft.config.identity import config_sha256
from raytune_ft.config.schema import Config
from raytune_ft.records import Point, RunResult
from raytune_ft.train.rules import Outcome
from raytune_ft.train.state import Progress


def run_result(
    status: Outcome,
    progress: Progress,
    store: CheckpointStore,
    config: Config,
    notes: tuple[str, ...],
) -> RunResult:
    """What the run leaves; its checkpoints are committed."""
    return RunResult(
        status=status,
        base=asdict(progress.base) if progress.base else None,
        best=progress.best,
        final=_with_checkpoint(progress, store),
        seed=config.seed,
        config_sha256=config_sha256(config),
        notes=notes,
    )


def _with_checkpoint(progress: Progress, store: CheckpointStore) -> Point | None:
    if progress.final is None:
        return None
    name = step_name(progress.final.step)
    kept = (store.root / name).is_dir()
    return replace(progress.final, checkpoint=f"checkpoints/{name}" if kept else None)
