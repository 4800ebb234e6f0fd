"""`result.json` of a run that came to its end."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from raytune_ft.config.identity import config_sha256
from raytune_ft.config.schema import Config
from raytune_ft.errors import InputError, RaytuneFtError, RunFailed
from raytune_ft.files import read_json, write_json_atomic
from raytune_ft.layout import METRICS, RESULT, checkpoint_path
from raytune_ft.records import BY_SOURCE, EvalMetrics, Point, RunResult, plain_of
from raytune_ft.train.checkpoint import Progress
from raytune_ft.train.run_state import Outcome
from raytune_ft.train.spec import RunSpec

Ending = Literal["failed", "pruned", "interrupted"]


def ended_result(spec: RunSpec, status: Ending, error: str | None = None) -> RunResult:
    """The best of what a run had evaluated and saved, by `metrics.jsonl`."""
    evaluations = _evaluations(spec.run_dir / METRICS)
    base = next((point for point in evaluations if point.examples == 0), None)
    points = [with_checkpoint(point, spec.run_dir) for point in evaluations if point.examples]
    saved = [point for point in points if point.checkpoint] or points
    sign = 1 if spec.mode == "min" else -1
    return RunResult(
        status=status,
        base=_numbers(base) if base else None,
        best=min(saved, key=lambda point: sign * getattr(point, spec.metric), default=None),
        final=points[-1] if points else None,
        seed=spec.config.seed,
        config_sha256=config_sha256(spec.config),
        error=error,
    )


def write_ended(spec: RunSpec, status: Ending, error: str | None = None) -> RunResult:
    """`result.json` of a run whose workers are gone."""
    result = ended_result(spec, status, error)
    write_result(spec.run_dir, result)
    return result


def write_result(run_dir: Path, result: RunResult) -> None:
    """Replaces `result.json`."""
    write_json_atomic(run_dir / RESULT, result)


def read_result(spec: RunSpec, error: RaytuneFtError | None) -> RunResult:
    """What the workers left in `result.json`; where they could not, a failed one is written.

    Raises:
        InputError: what the workers raised, for the user to mend.
        RunFailed: they could not.
    """
    result = load_result(spec.run_dir)
    if result is None:
        failure = error or RunFailed("the workers ended without a result")
        write_ended(spec, "failed", f"{type(failure).__name__}: {failure}")
        raise failure
    if isinstance(error, InputError):
        raise error
    return result


def load_result(run_dir: Path) -> RunResult | None:
    """`result.json` of an ended run, None where there is none."""
    path = run_dir / RESULT
    if not path.exists():
        return None
    data = read_json(path)
    points = {name: Point(**data[name]) if data.get(name) else None for name in ("best", "final")}
    lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
    return RunResult(**{**data, **points, **lists})


def _evaluations(path: Path) -> list[Point]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    points = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the half line of a killed writer
            record = json.loads(line)
            if record.get("eval_loss") is not None:
                known = EvalMetrics.__annotations__.keys() & record.keys()
                points.append(Point(**{key: record[key] for key in known}))
    return points


def with_checkpoint(point: Point, run_dir: Path) -> Point:
    """With the checkpoint of its step, where the run has kept it."""
    path = checkpoint_path(point.step)
    kept = path if (run_dir / path).is_dir() else None
    return replace(point, checkpoint=kept)


def _numbers(point: EvalMetrics) -> dict[str, Any]:
    return {
        "step": point.step,
        "examples": point.examples,
        **point.figures,
        BY_SOURCE: point.eval_loss_by_source,
    }


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
