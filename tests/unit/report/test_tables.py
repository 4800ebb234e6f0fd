"""What the tables say, and how Markdown says it."""

from __future__ import annotations

from pathlib import Path

from raytune_ft.report import tables
from raytune_ft.report.collect import collect
from raytune_ft.report.tables import Table


def test_trials(sweep_dir: Path) -> None:
    rows = collect(sweep_dir).result["trials"]
    table = tables.trials(rows, "trial-000")
    names = ("train.lr", "method.rank", "method.targets")
    assert table.columns == ("trial", "status", *names, "eval loss", "examples")
    first = ("trial-000", "completed", "0.0100", "8", "all-linear", "1.0000", "300")
    assert (table.rows[0], table.marked) == (first, 0)
    detailed = tables.trials(rows, None, "eval_exact_match", detailed=True)
    assert detailed.columns[5:] == ("eval exact match", "eval loss", "examples", "time")
    assert detailed.rows[0][-1] == "6 s"
    assert detailed.rows[5][1].startswith("completed: <script>")
    assert detailed.marked is None


def test_candidates_and_figures(sweep_dir: Path) -> None:
    promoted = collect(sweep_dir).promoted
    assert promoted is not None
    table = tables.candidates(promoted, {"eval_loss": "loss", "retention_kl": "KL"}.__getitem__)
    assert table.columns == ("candidate", "loss", "to the best", "95% interval", "KL")
    assert table.rows[1] == ("trial-000", "1.0000", "0.0500", "-0.0500 to 0.1500", "0.5000")
    assert table.rows[3] == ("uniform_soup", "0.9500", "-", "-", "1.5000")
    assert (table.title, table.marked) == ("candidates on validation (20 examples)", 1)
    del promoted["base"]["exact_match"], promoted["differences"]["exact_match"]
    table = tables.figures(promoted)
    assert table.columns[:2] == ("on test (40 examples)", "base")
    assert table.rows[0] == ("eval_loss", "3.0000", "1.1000", "-1.9000", "-2.1000 to -1.7000")
    assert table.rows[1] == ("exact_match", "-", "0.5000", "-", "-")


def test_caveats(sweep_dir: Path) -> None:
    promoted = collect(sweep_dir).promoted
    assert promoted is not None
    assert tables.caveats(promoted) == []
    constant, validation = tables.caveats(
        promoted | {"split": "validation", "reference": "constant"}
    )
    assert "no head" in constant
    assert "also selected the model" in validation
    assert tables.measured_on(promoted | {"looks": 3}).endswith("measured 3 times")


def test_markdown() -> None:
    table = Table(("name", "a|b"), (("x", "1"), ("y\nz", "2")), marked=1)
    assert tables.markdown(table).splitlines() == [
        "| name | a\\|b |",
        "| --- | --- |",
        "| x | 1 |",
        "| **y z** | 2 |",
    ]
