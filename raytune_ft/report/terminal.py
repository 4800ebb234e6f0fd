"""Output of the command line: lines, tables and a progress bar on stdout, errors on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from raytune_ft.config.objectives import REWARD
from raytune_ft.format import cell, number
from raytune_ft.records import EvalMetrics, StepMetrics
from raytune_ft.report.tables import Table

LOG_EVERY_S = 10.0
MAX_ERROR = 1000
MAX_TEXT = 200


def console() -> Console:
    """As wide as the terminal; in a log 200 columns, so that tables are not cut."""
    width = None if sys.stdout.isatty() else 200
    return Console(highlight=False, markup=False, emoji=False, width=width, soft_wrap=False)


def tell(line: str) -> None:
    """Print a line of progress and flush it."""
    print(line, flush=True)


def raw(text: str) -> None:
    """Print a piece of a log as it is, and flush it."""
    print(text, end="", flush=True)


def one_line(text: str) -> str:
    """The text without line breaks, cut to `MAX_TEXT` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MAX_TEXT else f"{flat[: MAX_TEXT - 3]}..."


def error_line(error: object) -> str:
    """`error: ...` on one line; characters that are not printable are escaped."""
    text = str(error) or type(error).__name__
    clean = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return f"error: {clean if len(clean) <= MAX_ERROR else clean[: MAX_ERROR - 3] + '...'}"


class LineReporter:
    """Prints a line at every evaluation, and one every ten seconds between evaluations."""

    def __init__(self, total_examples: int) -> None:
        self._total, self._last = total_examples, time.monotonic()

    def step(self, metrics: StepMetrics) -> None:
        now = time.monotonic()
        if now - self._last >= LOG_EVERY_S:
            self._last = now
            tell(f"{_progress(metrics, self._total)}  {_training(metrics)}")

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        best = f"  best so far, {checkpoint}" if checkpoint else ""
        name = "base eval_loss" if metrics.step == 0 else "eval_loss"
        losses = metrics.eval_loss_by_source.items()
        own = ", ".join(f"{source} {number(loss)}" for source, loss in losses)
        by_source = f" ({own})" if own else ""
        rewards = [name for name in metrics.figures if f"{name}:".startswith(f"{REWARD.name}:")]
        said = "".join(f"  {name} {number(metrics.figures[name])}" for name in rewards)
        tell(
            f"{_progress(metrics, self._total)}  {name} {number(metrics.eval_loss)}"
            f"{by_source}{said}{best}"
        )


class BarReporter:
    """A live progress bar; the lines of evaluations stay above it."""

    def __init__(self, total_examples: int) -> None:
        self._lines = LineReporter(total_examples)
        columns = (
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} examples"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.progress = Progress(*columns, console=console(), transient=True)
        self._task = self.progress.add_task("", total=total_examples)

    def step(self, metrics: StepMetrics) -> None:
        self.progress.update(self._task, completed=metrics.examples, description=_training(metrics))

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        self.progress.update(self._task, completed=metrics.examples)
        self._lines.evaluation(metrics, checkpoint)


def _progress(metrics: StepMetrics | EvalMetrics, total: int) -> str:
    return f"step {metrics.step:,}  {metrics.examples:,}/{total:,} examples"


def _training(metrics: StepMetrics) -> str:
    shown = f"loss {number(metrics.loss)}  lr {number(metrics.lr)}"
    if "reward" in metrics.figures:
        shown += f"  reward {number(metrics.figures['reward'])}"
    shown += f"  {metrics.tokens_per_s:,.0f} tokens/s"
    if metrics.mfu is not None:
        shown += f"  {metrics.mfu:.0%} of peak"
    return shown if metrics.peak_gib is None else f"{shown}  {metrics.peak_gib:,.1f} GiB"


def print_table(table: Table) -> None:
    """A table with its title; the marked row carries a star."""
    columns = [Column(name, overflow="fold") for name in table.columns]  # nothing is cut off
    grid = RichTable(*columns, title=table.title or None)
    for i, (first, *rest) in enumerate(table.rows):
        grid.add_row(f"{first} *" if i == table.marked else first, *rest)
    console().print(grid)


LOSS_BEGINS, LOSS_ENDS = "[[", "]]"


def marked(pieces: Iterable[tuple[str, bool]]) -> str:
    """An example as text, with what carries loss in marks."""
    return "".join(
        f"{LOSS_BEGINS}{text}{LOSS_ENDS}" if carries_loss else text for text, carries_loss in pieces
    )


def print_pieces(pieces: Sequence[tuple[str, bool]]) -> None:
    """An example; what carries loss is green on a terminal, and in marks in a log."""
    if not sys.stdout.isatty():
        tell(marked(pieces))
        return
    shown = Text()
    for text, carries_loss in pieces:
        shown.append(text, "green" if carries_loss else None)
    console().print(shown)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Names and values in two columns without a frame."""
    grid = RichTable.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(name, cell(value))
    console().print(grid)
