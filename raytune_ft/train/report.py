"""Where the numbers of a run go. The loop sees this protocol and never Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from raytune_ft.errors import Diverged
from raytune_ft.files import write_text_atomic
from raytune_ft.records import EvalMetrics, StepMetrics, to_json
from raytune_ft.train.checkpoint import Saver


class Reports(AbstractContextManager["Reports"]):
    """Evaluations on their way to the reporter, in order.

    All of them have arrived on exit, also where the run diverged, which all ranks see alike.
    """

    def __init__(self, saver: Saver, reporter: Reporter) -> None:
        self._saver, self._reporter = saver, reporter
        self._held: list[tuple[EvalMetrics, str | None]] = []

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Diverged):
            self.release()

    def hold(self, evaluation: EvalMetrics, checkpoint: str | None) -> None:
        """Where no checkpoint is to be waited for, it is passed on at once."""
        self._held.append((evaluation, checkpoint))
        if all(path is None for _, path in self._held):
            self._pass_on()

    def release(self) -> None:
        """Wait for the checkpoint that is being written, then pass everything on."""
        self._saver.wait()
        self._pass_on()

    def _pass_on(self) -> None:
        for evaluation, checkpoint in self._held:
            self._reporter.evaluation(evaluation, checkpoint)
        self._held.clear()


class Reporter(Protocol):
    """Called on every rank, in the same order."""

    def step(self, metrics: StepMetrics) -> None:
        """After every optimizer step."""

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        """After every evaluation; `checkpoint` is committed, and relative to the run."""


class Silent:
    """Tells nobody."""

    def step(self, metrics: StepMetrics) -> None:
        """Nothing."""

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        """Nothing."""


class Several:
    """Tells each in turn."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self.reporters = reporters

    def step(self, metrics: StepMetrics) -> None:
        """See `Reporter`."""
        for reporter in self.reporters:
            reporter.step(metrics)

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        """See `Reporter`."""
        for reporter in self.reporters:
            reporter.evaluation(metrics, checkpoint)


class MetricsFile:
    """`metrics.jsonl`: one object a line, whole lines only, in the order of the steps.

    `resume_step` cuts the file back to what the checkpoint of that step knows; None starts anew.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        kept = _lines_up_to(path, resume_step) if resume_step is not None else []
        write_text_atomic(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def step(self, metrics: StepMetrics) -> None:
        """See `Reporter`."""
        self._file.write(to_json(metrics) + "\n")

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        """See `Reporter`."""
        self._file.write(to_json(metrics) + "\n")

    def close(self) -> None:
        """Nothing is buffered beyond a line, so a killed run loses at most one."""
        self._file.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the half line of a killed writer
            continue
        if record["step"] <= step:
            kept.append(line if line.endswith("\n") else line + "\n")
    return kept
