"""The tables of a sweep and of an evaluation, described once.

The terminal prints them with Rich, `report.html` as HTML and the model card as Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from raytune_ft.config.metrics import compares
from raytune_ft.format import NONE, cell, interval, number, seconds, size

if TYPE_CHECKING:
    from raytune_ft.checkpoints.manage import Row
    from raytune_ft.model.hub import Download
    from raytune_ft.report.collect import Trial

Record = Mapping[str, Any]
Label = Callable[[str], str]
KEY_FIGURES = (
    *("answer_exact_match", "exact_match", "rougeL", "accuracy", "macro_f1", "r2", "pearson"),
    *("reward", "completion_tokens", "truncated", "retention_loss", "retention_kl"),
)
"""Shown beside the deciding figure where they were measured, most important first; before them win
rates."""


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        marked: index of the row that stands out: the best trial, the promoted candidate.
        words: how many columns from the left hold words; the others hold numbers.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    marked: int | None = None
    words: int = 1


def key_figures(names: Collection[str]) -> list[str]:
    """Of these figures the most important ones, in their order."""
    rates = [name for name in names if compares(name)]
    return [*rates, *(name for name in KEY_FIGURES if name in names)]


def trials(
    rows: Sequence[Record], best: str | None, metric: str = "eval_loss", detailed: bool = False
) -> Table:
    """One row per trial of a sweep's `result.json`; `detailed` adds errors and durations."""
    names = list(dict.fromkeys(name for row in rows for name in row["params"]))
    searched = metric != "eval_loss"
    columns = ["trial", "status", *names, *[metric.replace("_", " ")] * searched]
    columns += ["eval loss", "examples", *["time"] * detailed]
    return Table(
        tuple(columns),
        tuple(
            (
                str(row["id"]),
                f"{row['status']}: {row['error']}" if detailed and row["error"] else row["status"],
                *(cell(row["params"].get(name)) for name in names),
                *[cell(row.get("value"))] * searched,
                cell(row["eval_loss"]),
                cell(row["examples"]),
                *[seconds(row["wall_s"])] * detailed,
            )
            for row in rows
        ),
        "trials",
        next((i for i, row in enumerate(rows) if row["id"] == best), None),
        words=2,
    )


def usage(runs: Sequence[Trial]) -> Table | None:
    """One row per run on GPUs: the median of its steps beside what was expected of them, and the
    peak of its memory; None without such a run.
    """
    rows = []
    for run in runs:
        expected = run.forecast or {}
        if not run.steps or "peak_gib" not in run.steps[-1]:
            continue
        shares = [step["mfu"] for step in run.steps if "mfu" in step]
        rows.append(
            (
                run.id,
                f"{median(step['tokens_per_s'] for step in run.steps):,.0f}",
                _rounded(expected.get("tokens_per_s"), 0),
                f"{median(shares):.1%}" if shares else NONE,
                f"{max(step['peak_gib'] for step in run.steps):,.1f}",
                _rounded(expected.get("peak_gib"), 1),
            )
        )
    columns = ("run", "tokens/s", "expected", "of peak FLOP/s", "peak GiB", "expected")
    return Table(columns, tuple(rows), "GPUs") if rows else None


def _rounded(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def candidates(evaluation: Record, label: Label = str) -> Table:
    """All candidates on the validation split, the promoted one marked."""
    figure, rows = evaluation["metric"], evaluation["candidates"]
    beside = [name for name in key_figures(rows[0]["figures"]) if name != figure]
    return Table(
        ("candidate", label(figure), "to the best", _confidence(evaluation), *map(label, beside)),
        tuple(
            (
                row["name"],
                _value(row["figures"], figure),
                *_difference(None if row["difference"] is None else row),
                *(_value(row["figures"], name) for name in beside),
            )
            for row in rows
        ),
        f"candidates on validation ({evaluation['validation_examples']:,} examples)",
        next((i for i, row in enumerate(rows) if row["name"] == evaluation["winner"]), None),
    )


def figures(evaluation: Record, label: Label = str) -> Table:
    """Every figure of the promoted model against the reference, with the difference."""
    split, count = evaluation["split"], evaluation["examples"]
    return Table(
        (
            f"on {split} ({count:,} examples)",
            evaluation["reference"],
            "promoted",
            "difference",
            _confidence(evaluation),
        ),
        tuple(
            (
                label(name),
                _value(evaluation["base"], name),
                _value(evaluation["promoted"], name),
                *_difference(evaluation["differences"].get(name)),
            )
            for name in evaluation["promoted"]
        ),
    )


def downloads(rows: Sequence[Download]) -> Table:
    """One row for each model or data set and machine."""
    return Table(
        ("what", "machine", "where", "", "size"),
        tuple(
            (
                row.key,
                row.machine,
                row.found.folder,
                "downloaded" if row.found.new else "was there",
                size(row.found.bytes),
            )
            for row in rows
        ),
        "of the hub",
        words=4,
    )


def checkpoints(rows: Sequence[Row]) -> Table:
    """One row per checkpoint."""
    return Table(
        ("run", "checkpoint", "examples", "eval loss", "size", ""),
        tuple(
            (
                row.run,
                row.name,
                *(
                    [NONE] * 3
                    if row.manifest is None
                    else [
                        cell(row.manifest.examples),
                        cell(row.manifest.eval_loss),
                        size(row.bytes),
                    ]
                ),
                row.error or "referred to" * row.referred,
            )
            for row in rows
        ),
        "checkpoints",
        words=2,
    )


def measured_on(evaluation: Record) -> str:
    """`304 examples of the test split, measured once`."""
    times = "once" if evaluation["looks"] == 1 else f"{evaluation['looks']} times"
    return (
        f"{evaluation['examples']:,} examples of the {evaluation['split']} split, measured {times}"
    )


RULES = {
    "constant": "The constant gives every example the one answer that suits the training set best",
    "length": "Under the rule `length`, the longer answer of a pair wins, or the shorter one, "
    "whichever does more often in the training set",
}
"""What stands in for a base that has no head."""


def caveats(evaluation: Record) -> list[str]:
    """What a reader of the figures must know, one sentence each."""
    found = []
    if evaluation["reference"] in RULES:
        rule = RULES[evaluation["reference"]]
        found.append(f"{rule}: the base has no head to compare with.")
    if evaluation["split"] != "test":
        found.append(
            "There was no test data: these examples also selected the model, so the scores are "
            "optimistic."
        )
    return found


def markdown(table: Table) -> str:
    """Markdown, the marked row bold; the title is left out."""
    lines = [table.columns, ("---",) * len(table.columns)]
    for i, (first, *rest) in enumerate(table.rows):
        lines.append((f"**{first}**" if i == table.marked else first, *rest))
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _confidence(evaluation: Record) -> str:
    return f"{evaluation['confidence']:.0%} interval"


def _value(figures: Record, name: str) -> str:
    return number(figures[name]) if name in figures else NONE


def _difference(gap: Record | None) -> tuple[str, str]:
    if gap is None or gap["difference"] is None:
        return NONE, NONE
    return number(gap["difference"]), interval(gap["interval"])
