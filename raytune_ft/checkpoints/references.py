"""Which checkpoints a result, a merge or a promotion refers to: those are never collected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytune_ft.checkpoints.manifest import STEP_NAME
from raytune_ft.rundir import CHECKPOINTS, CONFIG, PROMOTED, RESULT, TRIALS


def run_folders(directory: Path) -> list[Path]:
    """The runs of a directory: a run, a sweep with its trials, or a run's `checkpoints`."""
    if directory.name == CHECKPOINTS:
        return [directory.parent]
    trials = sorted(path for path in (directory / TRIALS).glob("*") if path.is_dir())
    return [directory, *trials]


def referred(directory: Path) -> set[Path]:
    """Checkpoints of a run, or of a sweep and its trials, that its files name."""
    found: set[Path] = set()
    for run in run_folders(directory):
        for name in _named(_json(run / RESULT)):
            found.add((run / CHECKPOINTS / name).resolve())
    top = directory.parent if directory.name == CHECKPOINTS else directory
    # What was promoted names its checkpoints by path; runs may have moved, so by their last parts.
    for manifest in top.glob(f"{PROMOTED}*/**/*.json"):
        for text in _texts(_json(manifest)):
            parts = Path(text).parts
            if len(parts) > 1 and STEP_NAME.fullmatch(parts[-1]) and parts[-2] == CHECKPOINTS:
                run = top / TRIALS / parts[-3] if len(parts) > 3 and parts[-4] == TRIALS else top
                found.add((run / CHECKPOINTS / parts[-1]).resolve())
    return found


def sweep_of(run: Path) -> Path:
    """The sweep that a run is a trial of, or the run itself: whose files may refer to it."""
    above = run.parent.parent
    return above if run.parent.name == TRIALS and (above / CONFIG).is_file() else run


def _named(result: Any) -> Iterator[str]:
    """The names of steps that a result has anywhere, as its best, its final or a front's."""
    for text in _texts(result):
        if STEP_NAME.fullmatch(Path(text).name):
            yield Path(text).name


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
