"""Progress of a sweep: a live table on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from raytune_ft.config.objectives import Figure
from raytune_ft.format import number, params_text, seconds
from raytune_ft.records import Tell


class Progress(Protocol):
    """Receives the events of a sweep and shows them."""

    def live(self) -> AbstractContextManager[Any]:
        """A context in which the display may redraw itself."""

    def started(self, trial: str, params: Mapping[str, Any]) -> None:
        """A trial has started or resumed."""

    def reported(self, trial: str, examples: int, value: float) -> None:
        """The deciding figure of an evaluation; at 0 examples it is that of the base."""

    def finished(self, trial: str, status: str, value: float | None, error: str | None) -> None:
        """A trial has ended."""

    def note(self, line: str) -> None:
        """Any other message."""


STOPPED = ("pruned", "early_stopped")


class _Tally:
    """Counts of trials by state, the best value, and the time that the remaining trials need.

    Work is counted in examples: `_first` and `_at` are those at a trial's first report, which a
    resumed trial does not begin at 0, and at its last; `_lengths` those of the trials that ended.
    """

    def __init__(self, total: int, figure: Figure, now: Callable[[], float]) -> None:
        self._total, self._now = total, now
        self._better = min if figure.mode == "min" else max
        self._running: set[str] = set()
        self._stopped = self._completed = self._failed = 0
        self._best: dict[str, float] = {}
        self._first: dict[str, int] = {}
        self._at: dict[str, int] = {}
        self._lengths: list[int] = []
        self._begun: float | None = None

    @property
    def done(self) -> int:
        return self._stopped + self._completed + self._failed

    def started(self, trial: str) -> None:
        self._running.add(trial)
        if self._begun is None:
            self._begun = self._now()

    def reported(self, trial: str, examples: int, value: float) -> None:
        self._first.setdefault(trial, examples)
        self._at[trial] = examples
        if examples:
            self._best[trial] = self._better(value, self._best.get(trial, value))

    def finished(self, trial: str, status: str) -> None:
        self._running.discard(trial)
        self._lengths.append(self._at.get(trial, 0))
        if status == "failed":
            self._failed += 1
            self._best.pop(trial, None)
        elif status in STOPPED:
            self._stopped += 1
        else:
            self._completed += 1

    def best(self) -> str:
        """`; best so far 1.2500 (trial-000)`; empty before the first evaluation."""
        if not self._best:
            return ""
        name = self._better(self._best, key=lambda each: self._best[each])
        return f"; best so far {number(self._best[name])} ({name})"

    def left(self) -> str:
        """`; about 12 min left`, at the examples a second of all trials so far; empty before the
        first trial has ended and after the last.

        A trial is expected to become as long as those that ended, and were at least as long as it
        is now.
        """
        rest = self._total - self.done
        trained = sum(self._at[trial] - self._first[trial] for trial in self._at)
        if not self.done or rest <= 0 or not trained or self._begun is None:
            return ""
        running = [self._at.get(trial, 0) for trial in self._running]
        now = [*running, *[0] * (rest - len(running))]
        work = sum(self._expected(examples) - examples for examples in now)
        return f"; about {seconds((self._now() - self._begun) / trained * work)} left"

    def _expected(self, examples: int) -> float:
        """The expected length, in examples, of a trial that has trained on `examples` of them."""
        longer = [length for length in self._lengths if length >= examples]
        return sum(longer) / len(longer) if longer else examples

    def counts(self) -> str:
        """`2 running, 3 stopped, 4 completed, 1 failed of 24 trials`."""
        states = {
            "running": len(self._running),
            "stopped": self._stopped,
            "completed": self._completed,
            "failed": self._failed,
        }
        shown = [f"{count} {state}" for state, count in states.items() if count]
        return f"{', '.join(shown) or 'none begun'} of {self._total} trials"


class Lines:
    """One line per event."""

    def __init__(
        self,
        tell: Tell,
        total: int,
        figure: Figure,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell, self._total, self._name = tell, total, figure.name
        self._tally = _Tally(total, figure, now)

    def live(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def started(self, trial: str, params: Mapping[str, Any]) -> None:
        self._tally.started(trial)
        self._tell(f"{trial} started: {params_text(params)}")

    def reported(self, trial: str, examples: int, value: float) -> None:
        self._tally.reported(trial, examples, value)
        if examples:
            self._tell(f"{trial}: {self._name} {number(value)} after {examples:,} examples")

    def finished(self, trial: str, status: str, value: float | None, error: str | None) -> None:
        tally = self._tally
        tally.finished(trial, status)
        best = "" if value is None else f", {self._name} {number(value)}"
        why = f": {error}" if error else ""
        state = f"{tally.done}/{self._total} trials{tally.best()}{tally.left()}"
        self._tell(f"{trial} {status}{best}{why} [{state}]")

    def note(self, line: str) -> None:
        self._tell(line)


@dataclass
class _Row:
    params: str
    status: str = "starting"
    examples: int = 0
    value: float | None = None
    over: bool = False


class LiveTable:
    """A table of trials that redraws itself; it disappears when the sweep ends."""

    def __init__(
        self,
        console: Console,
        total: int,
        figure: Figure,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._name = console, figure.name
        self._rows: dict[str, _Row] = {}
        self._tally = _Tally(total, figure, now)

    def live(self) -> AbstractContextManager[Any]:
        return Live(
            get_renderable=self.table,
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )

    def started(self, trial: str, params: Mapping[str, Any]) -> None:
        self._tally.started(trial)
        self._rows[trial] = _Row(params_text(params))

    def reported(self, trial: str, examples: int, value: float) -> None:
        row = self._rows[trial]
        row.status, row.examples, row.value = "training", examples, value
        self._tally.reported(trial, examples, value)

    def finished(self, trial: str, status: str, value: float | None, error: str | None) -> None:
        self._tally.finished(trial, status)
        row = self._rows.setdefault(trial, _Row(""))
        row.status = f"{status}: {error}" if error else status
        row.value, row.over = value, True

    def note(self, line: str) -> None:
        self._console.print(line)

    def table(self) -> Table:
        """As many trials as fit the terminal: ended ones, the latest last, then running ones."""
        table = Table("trial", "params", "status", "examples", self._name.replace("_", " "))
        rows = sorted(self._rows.items(), key=lambda item: not item[1].over)
        room = max(4, self._console.height - 6)
        for trial, row in rows[-room:]:
            value = "" if row.value is None else number(row.value)
            table.add_row(trial, row.params, row.status, f"{row.examples:,}", value)
        tally = self._tally
        table.caption = f"{tally.counts()}{tally.best()}{tally.left()}"
        return table


def progress_for(
    tell: Tell, total: int, figure: Figure, console: Console | None = None
) -> Progress:
    """A live table on a terminal, otherwise lines through `tell`. `figure` is what is searched."""
    console = console or Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        return LiveTable(console, total, figure)
    return Lines(tell, total, figure)
