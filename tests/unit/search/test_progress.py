"""What a person sees of a sweep."""

from __future__ import annotations

import io

from rich.console import Console

from raytune_ft.search.progress import Lines, LiveTable, progress_for


def test_a_log_gets_a_line_for_everything() -> None:
    lines: list[str] = []
    progress = progress_for(lines.append, 3, Console(file=io.StringIO()))
    assert isinstance(progress, Lines)
    progress.started("trial-000", {"train.lr": 0.000123456, "method.rank": 8})
    progress.reported("trial-000", 0, 9.0)
    progress.reported("trial-000", 1000, 1.25)
    progress.finished("trial-000", "pruned", 1.25, None)
    progress.reported("trial-001", 1000, 0.5)
    progress.finished("trial-001", "failed", None, "Diverged: step 3")
    assert lines == [
        "trial-000 started: train.lr=0.000123 method.rank=8",
        "trial-000: eval_loss 1.2500 after 1,000 examples",
        "trial-000 pruned, eval_loss 1.2500 [1/3 trials; lowest so far 1.2500 (trial-000)]",
        "trial-001: eval_loss 0.5000 after 1,000 examples",
        "trial-001 failed: Diverged: step 3 [2/3 trials; lowest so far 1.2500 (trial-000)]",
    ]


def test_a_terminal_gets_a_table_that_fits_it() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, height=20)
    progress = progress_for(print, 30, console)
    assert isinstance(progress, LiveTable)
    with progress.live():
        for number in range(25):
            progress.started(f"trial-{number:03d}", {"train.lr": 0.1})
        progress.reported("trial-024", 10, 1.5)
        progress.finished("trial-024", "completed", 1.4, None)
    table = progress.table()
    assert table.row_count == 14
    assert table.caption == "1 of 30 trials done, lowest eval loss 1.4000"
