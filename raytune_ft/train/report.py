"""Where the numbers of a run go. The loop sees this protocol and never Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from raytune_ft.files import write_text_atomic
from raytune_ft.records import EvalMetrics, StepMetrics, to_json


class Reporter(Protocol):
    """Gets the metrics of a run; called on every rank, in the same order."""

    def step(self, metrics: StepMetrics) -> None:
        """Called after every optimizer step."""

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        """Called after every evaluation; `checkpoint`, relative to the run, is committed."""


class Silent:
    """Ignores all metrics."""

    def step(self, metrics: StepMetrics) -> None: ...

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None: ...


class Several:
    """Passes metrics on to each of several reporters, in order."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self.reporters = reporters

    def step(self, metrics: StepMetrics) -> None:
        for reporter in self.reporters:
            reporter.step(metrics)

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        for reporter in self.reporters:
            reporter.evaluation(metrics, checkpoint)


class MetricsFile:
    """`metrics.jsonl`: one object a line, whole lines only, in the order of the steps.

    `resume_step` cuts the file back to the checkpoint of that step; None begins a new file.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        kept = lines_up_to(path, resume_step) if resume_step is not None else []
        write_text_atomic(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def step(self, metrics: StepMetrics) -> None:

        self._file.write(to_json(metrics) + "\n")

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:

        self._file.write(to_json(metrics) + "\n")

    def close(self) -> None:
        """Close the file. It is flushed at every line, so a killed run loses at most one line."""
        self._file.close()


def lines_up_to(path: Path, step: int) -> list[str]:
    """The whole lines of a file of JSON whose `step` is not behind this one; none where there is no
    such file.
    """
    if not path.exists():
        return []
    kept = []
    with path.open(encoding="utf-8") as lines:  # `str.splitlines` also breaks texts apart
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the half line of a killed writer
                continue
            if record["step"] <= step:
                kept.append(line if line.endswith("\n") else line + "\n")
    return kept
