"""`result.json`: how a run ended, who decides that, and what it says."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

from raytune_ft.config.identity import config_sha256
from raytune_ft.errors import InputError, RaytuneFtError, RunFailed
from raytune_ft.files import read_json, write_json_atomic
from raytune_ft.layout import METRICS, RESULT, checkpoint_path
from raytune_ft.records import EvalMetrics, Point, Progress, RunResult, plain_of
from raytune_ft.rundir import RunSpec

Outcome = Literal["completed", "early_stopped", "interrupted"]
Ending = Literal["failed", "pruned", "interrupted"]


def end_run(
    spec: RunSpec, end: RunResult | Ending, error: BaseException | str | None = None
) -> RunResult:
    """Decide how a run ended, and write its `result.json`: every end of every run passes here.

    Several processes may see the same run end. Who wins, strongest first:

    1. The search: a trial that the study counts as pruned or failed is that, whatever it reached.
    2. The run itself, a `RunResult` written by its rank 0: completed, stopped early, or failed by
       itself (diverged, out of memory, wrong input, a hang that its own watchdog found). A run
       alone in its process writes "interrupted" too.
    3. The process that started the run, where the run left nothing: "interrupted" if it was asked
       to stop, else "failed" with the error that ended the workers.

    So a run that completes while Ctrl-C arrives is completed, and a group that dies after rank 0
    wrote its result keeps that result. Returns what `result.json` holds now.
    """
    if isinstance(end, RunResult):
        result = end
    elif end != "pruned" and (left := load_result(spec.run_dir)) is not None:
        return left
    else:
        result = _from_metrics(spec, end, error)
    write_json_atomic(spec.run_dir / RESULT, result)
    return result


def failed_result(spec: RunSpec, error: BaseException | str | None) -> RunResult:
    """The result of a run that failed by itself, with what it had evaluated and saved."""
    return _from_metrics(spec, "failed", error)


def run_result(
    status: Outcome, progress: Progress, spec: RunSpec, notes: tuple[str, ...]
) -> RunResult:
    """The result of a run that stands at `progress`; its checkpoints are committed."""
    return RunResult(
        status=status,
        base=plain_of(progress.base) if progress.base else None,
        best=progress.best,
        final=with_checkpoint(progress.final, spec.run_dir) if progress.final else None,
        seed=spec.config.seed,
        config_sha256=config_sha256(spec.config),
        notes=notes,
    )


def left_by_workers(spec: RunSpec, error: RaytuneFtError | None) -> RunResult:
    """The result of a run whose workers are gone; `error` is what they raised.

    Raises:
        InputError: the input is wrong.
        RunFailed: the workers left no result; a failed one is written.
    """
    result = load_result(spec.run_dir)
    if result is None:
        failure = error or RunFailed("the workers ended without a result")
        end_run(spec, "failed", failure)
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
    points = {name: Point.of(data[name]) if data.get(name) else None for name in ("best", "final")}
    lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
    return RunResult(**{**data, **points, **lists})


def _evaluations(path: Path) -> list[Point]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    points = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the half line of a killed writer
            record = json.loads(line)
            if record.get("eval_loss") is not None:
                points.append(Point.of(record))
    return points


def with_checkpoint(point: Point, run_dir: Path) -> Point:
    """With the checkpoint of its step, where the run has kept it."""
    path = checkpoint_path(point.step)
    kept = path if (run_dir / path).is_dir() else None
    return replace(point, checkpoint=kept)


def _from_metrics(spec: RunSpec, status: Ending, error: BaseException | str | None) -> RunResult:
    """From `metrics.jsonl`; `best` is the best evaluation whose checkpoint is still there."""
    evaluations = _evaluations(spec.run_dir / METRICS)
    base = next((point for point in evaluations if point.examples == 0), None)
    points = [with_checkpoint(point, spec.run_dir) for point in evaluations if point.examples]
    saved = [point for point in points if point.checkpoint] or points
    sign = 1 if spec.mode == "min" else -1
    return RunResult(
        status=status,
        base=plain_of(EvalMetrics.of(base.plain)) if base else None,
        best=min(saved, key=lambda point: sign * point.value(spec.metric), default=None),
        final=points[-1] if points else None,
        seed=spec.config.seed,
        config_sha256=config_sha256(spec.config),
        error=f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error,
    )
