"""`result.json` of a run that came to its end."""

from __future__ import annotations

from pathlib import Path

from raytune_ft.config.identity import config_sha256
from raytune_ft.config.schema import Config
from raytune_ft.records import RunResult, plain_of
from raytune_ft.train.ended import with_checkpoint
from raytune_ft.train.run_state import Outcome
from raytune_ft.train.state import Progress


def run_result(
    status: Outcome,
    progress: Progress,
    run_dir: Path,
    config: Config,
    notes: tuple[str, ...],
) -> RunResult:
    """What the run leaves; its checkpoints are committed."""
    return RunResult(
        status=status,
        base=plain_of(progress.base) if progress.base else None,
        best=progress.best,
        final=with_checkpoint(progress.final, run_dir) if progress.final else None,
        seed=config.seed,
        config_sha256=config_sha256(config),
        notes=notes,
    )
