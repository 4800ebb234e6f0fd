"""What people see: lines and tables on stdout, one `error:` line on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from raytune_ft.records import EvalMetrics, StepMetrics

if TYPE_CHECKING:
    from raytune_ft.checkpoints.manage import Row

LOG_EVERY_S = 10.0
MAX_ERROR = 1000
MAX_TEXT = 200
SHOWN_BESIDE = (
    *("answer_exact_match", "exact_match", "retention_loss", "retention_kl"),
    *("accuracy", "macro_f1", "r2", "pearson"),
)
"""Figures of every candidate beside the one that decides."""


def console() -> Console:
    """Rich on a terminal; plain lines, not cut and not wrapped, in a log."""
    width = None if sys.stdout.isatty() else 200
    return Console(highlight=False, markup=False, emoji=False, width=width, soft_wrap=False)


def tell(line: str) -> None:
    """One line of progress, at once."""
    print(line, flush=True)


def one_line(text: str, limit: int = MAX_TEXT) -> str:
    """A text without line breaks, its end cut off where it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[: limit - 3]}..."


def error_line(error: object) -> str:
    """`error: ...` on one line, whatever the message holds."""
    text = str(error) or type(error).__name__
    clean = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return f"error: {clean if len(clean) <= MAX_ERROR else clean[: MAX_ERROR - 3] + '...'}"


class LineReporter:
    """A line at every evaluation, and one every ten seconds in between."""

    def __init__(self, total_examples: int) -> None:
        self._total, self._last = total_examples, time.monotonic()

    def step(self, metrics: StepMetrics) -> None:
        """See `Reporter`."""
        now = time.monotonic()
        if now - self._last >= LOG_EVERY_S:
            self._last = now
            tell(f"{_progress(metrics, self._total)}  {_training(metrics)}")

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        """See `Reporter`."""
        best = f"  best so far, {checkpoint}" if checkpoint else ""
        name = "base eval_loss" if metrics.step == 0 else "eval_loss"
        own = [f"{source} {loss:.4f}" for source, loss in metrics.eval_loss_by_source.items()]
        by_source = f" ({', '.join(own)})" if own else ""
        shown = f"{name} {metrics.eval_loss:.4f}{by_source}"
        tell(f"{_progress(metrics, self._total)}  {shown}{best}")


class BarReporter:
    """A live bar on a terminal; the lines of evaluations stay above it."""

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
        """See `Reporter`."""
        shown = _training(metrics)
        self.progress.update(self._task, completed=metrics.examples, description=shown)

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        """See `Reporter`."""
        self.progress.update(self._task, completed=metrics.examples)
        self._lines.evaluation(metrics, checkpoint)


def _progress(metrics: StepMetrics | EvalMetrics, total: int) -> str:
    return f"step {metrics.step:,}  {metrics.examples:,}/{total:,} examples"


def _training(metrics: StepMetrics) -> str:
    return f"loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  {metrics.tokens_per_s:,.0f} tokens/s"


def trials_table(
    trials: Sequence[Mapping[str, Any]], best: str | None, metric: str = "eval_loss"
) -> Table:
    """One row a trial, the best by `metric` marked."""
    names = list(dict.fromkeys(name for trial in trials for name in trial["params"]))
    searched = [] if metric == "eval_loss" else [metric.replace("_", " ")]
    table = Table("trial", "status", *names, *searched, "eval loss", "examples", title="trials")
    for trial in trials:
        params = [_value(trial["params"].get(name)) for name in names]
        mark = " *" if trial["id"] == best else ""
        loss, examples = _value(trial["eval_loss"]), f"{trial['examples']:,}"
        values = [_value(trial["value"])] if searched else []
        table.add_row(str(trial["id"]) + mark, trial["status"], *params, *values, loss, examples)
    return table


def checkpoints_table(rows: Sequence[Row]) -> Table:
    """One row a checkpoint."""
    table = Table("run", "checkpoint", "examples", "eval loss", "MB", "", title="checkpoints")
    for row in rows:
        manifest = row.manifest
        figures = (
            ["-", "-", "-"]
            if manifest is None
            else [
                f"{manifest.examples:,}",
                _value(manifest.eval_loss),
                f"{row.bytes / 1e6:,.1f}",
            ]
        )
        table.add_row(row.run, row.name, *figures, row.error or "referred to" * row.referred)
    return table


def evaluation_table(
    split: str,
    reference: str,
    base: Mapping[str, float],
    promoted: Mapping[str, float],
    differences: Mapping[str, Mapping[str, Any]],
) -> Table:
    """Promoted against the base, or what `reference` names, with the interval of the difference."""
    table = Table(f"on {split}", reference, "promoted", "difference", "95% interval")
    for name, value in promoted.items():
        gap = differences.get(name)
        shown = [_value(gap["difference"]), _interval(gap["interval"])] if gap else ["-", "-"]
        table.add_row(name, _value(base.get(name)), _value(value), *shown)
    return table


def candidates_table(evaluation: Mapping[str, Any]) -> Table:
    """All candidates on validation, the promoted one marked."""
    figure = evaluation["metric"]
    others = [
        name
        for name in SHOWN_BESIDE
        if name != figure and name in evaluation["candidates"][0]["figures"]
    ]
    count = f"{evaluation['validation_examples']:,}"
    title = f"candidates on validation ({count} examples)"
    table = Table("candidate", figure, "to the best", "95% interval", *others, title=title)
    for row in evaluation["candidates"]:
        mark = " *" if row["name"] == evaluation["winner"] else ""
        figures = [_value(row["figures"].get(name)) for name in others]
        gap, interval = row["difference"], row["interval"]
        to_best = ["-", "-"] if gap is None else [_value(gap), _interval(interval)]
        table.add_row(row["name"] + mark, _value(row["figures"][figure]), *to_best, *figures)
    return table


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Two columns without a frame."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(name, _value(value))
    return table


def _interval(ends: Sequence[float] | None) -> str:
    return "too few examples" if ends is None else " to ".join(map(_value, ends))


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if 0.01 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
