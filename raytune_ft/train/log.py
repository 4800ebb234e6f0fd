"""What rank 0 of a run keeps of its metrics: `metrics.jsonl`, and the trackers of the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raytune_ft.config.yaml_text import read_mapping
from raytune_ft.rundir import CONFIG, METRICS, TRIALS
from raytune_ft.train.report import MetricsFile, Several
from raytune_ft.train.spec import RunSpec
from raytune_ft.train.trackers import Identity, Tracked

SHOWN = ("seed", "model", "method", "data", "train")


class Log(Several):
    """A `Reporter` that tells the file first, then each tracker."""

    def __init__(self, spec: RunSpec, resume_step: int | None) -> None:
        tracking = spec.config.tracking
        self._file = MetricsFile(spec.run_dir / METRICS, resume_step)
        run = identity_of(spec, resume_step)
        self._trackers = [Tracked(name, tracking, run) for name in tracking.to]
        super().__init__([self._file, *self._trackers])

    def close(self) -> None:
        """At the end of the run, however it came."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def identity_of(spec: RunSpec, resume_step: int | None) -> Identity:
    """A trial's group is its sweep, by the directories that they have."""
    run_dir = spec.run_dir
    in_sweep = run_dir.parent.name == TRIALS
    saved = _saved(run_dir / CONFIG)
    return Identity(
        spec.config.name,
        run_dir.parent.parent.name if in_sweep else spec.config.name,
        run_dir,
        _flat({key: value for key, value in saved.items() if key in SHOWN}),
        resume_step,
        str((saved.get("tracking") or {}).get("uri") or ""),
    )


def _saved(path: Path) -> dict[str, Any]:
    """The config as it was saved, in which `${ENV_NAME}` stands for what is secret."""
    return read_mapping(path) if path.is_file() else {}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        dotted: item
        for key, inner in value.items()
        for dotted, item in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }
