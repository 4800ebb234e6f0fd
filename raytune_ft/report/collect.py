"""Facts of a run or a sweep, read from its files. No model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.config.load import load_config
from raytune_ft.config.schema import Config
from raytune_ft.errors import StorageError
from raytune_ft.files import read_object
from raytune_ft.layout import CONFIG, DATA, EVALUATION, FORECAST, METRICS, PROMOTED, RESULT, TRIALS

Record = dict[str, Any]
RUNNING: Record = {
    **{"params": {}, "status": "running", "eval_loss": None, "value": None},
    **{"examples": 0, "wall_s": 0.0, "error": None},
}
"""A trial of a sweep that has no result.json yet."""


@dataclass(frozen=True)
class Trial:
    """A trial, or a run outside a sweep.

    Attributes:
        value: the best value of the metric that ranks trials.
        steps, evaluations: lines of metrics.jsonl.
        values: of a search for several metrics, all of them at the best checkpoint.
        forecast: what was expected of it, None where nothing was.
    """

    id: str
    params: Mapping[str, Any]
    status: str
    value: float | None
    examples: int
    wall_s: float
    error: str | None
    steps: Sequence[Record]
    evaluations: Sequence[Record]
    values: Mapping[str, float] | None = None
    forecast: Mapping[str, float | None] | None = None


@dataclass(frozen=True)
class Facts:
    """What the report shows.

    Attributes:
        result: result.json; `status` is "running" where there is none yet.
        promoted: promoted/evaluation.json, None before a promotion.
        data: data.json, None where there is none.
        metric, mode: what ranked the trials, and which way is better.
    """

    directory: Path
    config: Config
    result: Record
    trials: Sequence[Trial]
    promoted: Record | None
    data: Record | None
    metric: str
    mode: str
    config_text: str

    @property
    def is_sweep(self) -> bool:
        """Whether this is a sweep."""
        return "trials" in self.result

    @property
    def best(self) -> str | None:
        """The id of the best trial; None before the first usable one."""
        best = self.result.get("best") or {}
        if self.is_sweep:
            return best.get("trial")
        return self.trials[0].id if best else None

    @property
    def best_trial(self) -> Trial | None:
        """The best trial; None before the first usable one, or where it has no directory."""
        return next((trial for trial in self.trials if trial.id == self.best), None)


def collect(directory: Path) -> Facts:
    """Read what the run or sweep in `directory` has written so far.

    Raises:
        StorageError: the directory is not one of a run or a sweep.
    """
    if not (directory / CONFIG).is_file():
        raise StorageError(
            str(directory), f"holds no {CONFIG} of a run", "write the directory of a run or a sweep"
        )
    config = load_config(directory / CONFIG)
    result = read_object(directory / RESULT) or {"status": "running"}
    search = config.search if "trials" in result or (directory / TRIALS).is_dir() else None
    metric = search.metrics[0] if search else "eval_loss"
    mode = search.modes[0] if search else "min"
    if search is not None and "trials" not in result:
        names = (path.name for path in sorted((directory / TRIALS).iterdir()))
        result = {**result, "trials": [RUNNING | {"id": name} for name in names]}
    trials = (
        [_run(directory, config.name, result, metric)]
        if search is None
        else [_trial(directory / TRIALS / row["id"], row) for row in result["trials"]]
    )
    return Facts(
        directory,
        config,
        result,
        trials,
        read_object(directory / PROMOTED / EVALUATION),
        read_object(directory / DATA),
        metric,
        mode,
        (directory / CONFIG).read_text(encoding="utf-8"),
    )


def _run(directory: Path, name: str, result: Record, metric: str) -> Trial:
    steps, evaluations = _metrics(directory / METRICS)
    best = result.get("best") or {}
    last = steps[-1] if steps else {}
    return Trial(
        name,
        {},
        result["status"],
        best.get(metric),
        int(last.get("examples", 0)),
        float(last.get("wall_s", 0.0)),
        result.get("error"),
        steps,
        evaluations,
        forecast=read_object(directory / FORECAST),
    )


def _trial(directory: Path, row: Record) -> Trial:
    steps, evaluations = _metrics(directory / METRICS)
    return Trial(
        row["id"],
        row["params"],
        row["status"],
        row["value"],
        row["examples"],
        row["wall_s"],
        row["error"],
        steps,
        evaluations,
        row.get("values"),
        read_object(directory / FORECAST),
    )


def _metrics(path: Path) -> tuple[list[Record], list[Record]]:
    """Steps and evaluations of metrics.jsonl; an incomplete last line is ignored."""
    steps, evaluations = list[Record](), list[Record]()
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            (evaluations if "eval_loss" in record else steps).append(record)
    return steps, evaluations
