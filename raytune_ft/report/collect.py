"""Facts of a run or a sweep, read from the files that it left; nothing is loaded or run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.config.load import load_config
from raytune_ft.config.schema import Config
from raytune_ft.errors import StorageError
from raytune_ft.layout import CONFIG, DATA, EVALUATION, METRICS, PROMOTED, RESULT, TRIALS

Record = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A trial, or a run of its own. `steps` and `evaluations` are its lines of metrics.jsonl."""

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


@dataclass(frozen=True)
class Facts:
    """`promoted` is evaluation.json, `data` is data.json; each is None where there is none.

    `metric` and `mode` are those that ranked trials, as in metrics.jsonl.
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
        """Whether there was a search."""
        return "trials" in self.result

    @property
    def best(self) -> str | None:
        """The id of the best trial."""
        best = self.result.get("best") or {}
        if self.is_sweep:
            return best.get("trial")
        return self.trials[0].id if best else None


def collect(directory: Path) -> Facts:
    """Read what the run or sweep in `directory` left so far.

    Raises:
        StorageError: it is no run or sweep.
    """
    if not (directory / CONFIG).is_file():
        raise StorageError(
            str(directory), f"holds no {CONFIG} of a run", "write the directory of a run or a sweep"
        )
    config = load_config(directory / CONFIG)
    result = read_json(directory / RESULT) or {"status": "running"}
    search = config.search if "trials" in result or (directory / TRIALS).is_dir() else None
    metric = search.metrics[0] if search else "eval_loss"
    mode = search.modes[0] if search else "min"
    rows = result.get("trials")
    if rows is None and search is not None:
        result = {**result, "trials": []}
        rows = [{"id": path.name} for path in sorted((directory / TRIALS).iterdir())]
    trials = (
        [_run(directory, config.name, result, metric)]
        if rows is None
        else [_trial(directory / TRIALS / row["id"], row, metric) for row in rows]
    )
    return Facts(
        directory,
        config,
        result,
        trials,
        read_json(directory / PROMOTED / EVALUATION),
        read_json(directory / DATA),
        metric,
        mode,
        (directory / CONFIG).read_text(encoding="utf-8"),
    )


def read_json(path: Path) -> Record | None:
    """The object in a file, None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


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
    )


def _trial(directory: Path, row: Record, metric: str) -> Trial:
    steps, evaluations = _metrics(directory / METRICS)
    value = row.get("value")
    return Trial(
        row["id"],
        row.get("params", {}),
        row.get("status", "running"),
        row.get("eval_loss") if value is None and metric == "eval_loss" else value,
        int(row.get("examples", 0)),
        float(row.get("wall_s", 0.0)),
        row.get("error"),
        steps,
        evaluations,
        row.get("values"),
    )


def _metrics(path: Path) -> tuple[list[Record], list[Record]]:
    """Steps and evaluations of metrics.jsonl; a half line of a killed writer is left out."""
    steps, evaluations = list[Record](), list[Record]()
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            (evaluations if "eval_loss" in record else steps).append(record)
    return steps, evaluations
