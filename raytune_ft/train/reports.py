"""Evaluations on their way to whoever listens, which wait for the checkpoints they earned."""

from __future__ import annotations

from contextlib import AbstractContextManager

from raytune_ft.errors import Diverged
from raytune_ft.records import EvalMetrics
from raytune_ft.train.checkpoint import Saver
from raytune_ft.train.report import Reporter


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
