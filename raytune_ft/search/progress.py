"""A sweep as a person follows it: a live table on a terminal, plain lines in a log. No ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

Tell = Callable[[str], None]


class Progress(Protocol):
    """What a sweep says while it runs. A context: what is live is live inside."""

    def live(self) -> AbstractContextManager[Any]:
        """Inside, things may move."""

    def started(self, trial: str, params: Mapping[str, Any]) -> None:
        """A trial has begun, or goes on."""

    def reported(self, trial: str, examples: int, eval_loss: float) -> None:
        """An evaluation of a trial; at 0 examples it is the untouched base."""

    def finished(self, trial: str, status: str, eval_loss: float | None, error: str | None) -> None:
        """A trial is over."""

    def note(self, line: str) -> None:
        """Anything else."""


@dataclass
class _Row:
    params: str
    status: str = "starting"
    examples: int = 0
    eval_loss: float | None = None
    begun: float = field(default_factory=time.monotonic)


class Lines:
    """One line for everything that happens."""

    def __init__(self, tell: Tell, total: int) -> None:
        self._tell, self._total = tell, total
        self._done = 0
        self._lowest: dict[str, float] = {}

    def live(self) -> AbstractContextManager[Any]:
        """See `Progress`."""
        return nullcontext()

    def started(self, trial: str, params: Mapping[str, Any]) -> None:
        """See `Progress`."""
        self._tell(f"{trial} started: {shown_params(params)}")

    def reported(self, trial: str, examples: int, eval_loss: float) -> None:
        """See `Progress`."""
        if examples:
            self._lowest[trial] = min(eval_loss, self._lowest.get(trial, eval_loss))
            self._tell(f"{trial}: eval_loss {eval_loss:.4f} after {examples:,} examples")

    def finished(self, trial: str, status: str, eval_loss: float | None, error: str | None) -> None:
        """See `Progress`."""
        self._done += 1
        if status == "failed":
            self._lowest.pop(trial, None)
        loss = "" if eval_loss is None else f", eval_loss {eval_loss:.4f}"
        why = f": {error}" if error else ""
        best = ""
        if self._lowest:
            name = min(self._lowest, key=lambda each: self._lowest[each])
            best = f"; lowest so far {self._lowest[name]:.4f} ({name})"
        self._tell(f"{trial} {status}{loss}{why} [{self._done}/{self._total} trials{best}]")

    def note(self, line: str) -> None:
        """See `Progress`."""
        self._tell(line)


class LiveTable:
    """A table of all trials that redraws itself; it is gone when the sweep is over."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._rows: dict[str, _Row] = {}
        self._done = 0

    def live(self) -> AbstractContextManager[Any]:
        """See `Progress`."""
        return Live(
            get_renderable=self.table,
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )

    def started(self, trial: str, params: Mapping[str, Any]) -> None:
        """See `Progress`."""
        self._rows[trial] = _Row(shown_params(params))

    def reported(self, trial: str, examples: int, eval_loss: float) -> None:
        """See `Progress`."""
        row = self._rows[trial]
        row.status, row.examples, row.eval_loss = "training", examples, eval_loss

    def finished(self, trial: str, status: str, eval_loss: float | None, error: str | None) -> None:
        """See `Progress`."""
        self._done += 1
        row = self._rows.setdefault(trial, _Row(""))
        row.status = f"{status}: {error}" if error else status
        row.eval_loss = eval_loss

    def note(self, line: str) -> None:
        """See `Progress`."""
        self._console.print(line)

    def table(self) -> Table:
        """The trials so far, the latest last."""
        table = Table("trial", "params", "status", "examples", "eval loss")
        rows = list(self._rows.items())
        room = max(4, self._console.height - 6)
        for trial, row in rows[-room:]:
            loss = "" if row.eval_loss is None else f"{row.eval_loss:.4f}"
            table.add_row(trial, row.params, row.status, f"{row.examples:,}", loss)
        ended = [
            row.eval_loss
            for row in self._rows.values()
            if row.eval_loss is not None and row.examples
        ]
        best = f", lowest eval loss {min(ended):.4f}" if ended else ""
        table.caption = f"{self._done} of {self._total} trials done{best}"
        return table


def progress_for(tell: Tell, total: int, console: Console | None = None) -> Progress:
    """The live table where there is a terminal, otherwise lines through `tell`."""
    console = console or Console(highlight=False, markup=False, emoji=False)
    return LiveTable(console, total) if console.is_terminal else Lines(tell, total)


def shown_params(params: Mapping[str, Any]) -> str:
    """`train.lr=0.000123 method.rank=8`."""
    return " ".join(f"{key}={_shown(value)}" for key, value in params.items())


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
