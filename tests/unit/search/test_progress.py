"""What a person sees of a sweep."""

from __future__ import annotations

import io
from itertools import chain, repeat

from rich.console import Console

from raytune_ft.search.progress import Lines, LiveTable, progress_for


def test_a_log_gets_a_line_for_everything() -> None:
    lines: list[str] = []
    assert isinstance(progress_for(print, 3, Console(file=io.StringIO())), Lines)
    progress = Lines(lines.append, 3, iter([0.0, 120.0, 150.0]).__next__)
    progress.started("trial-000", {"train.lr": 0.000123456, "method.rank": 8})
    progress.reported("trial-000", 0, 9.0)
    progress.reported("trial-000", 1000, 1.25)
    progress.finished("trial-000", "pruned", 1.25, None)
    progress.reported("trial-001", 1000, 0.5)
    progress.finished("trial-001", "failed", None, "Diverged: step 3")
    assert lines == [
        "trial-000 started: train.lr=0.000123 method.rank=8",
        "trial-000: eval_loss 1.2500 after 1,000 examples",
        "trial-000 pruned, eval_loss 1.2500 [1/3 trials; lowest so far 1.2500 (trial-000); about "
        "4 min left]",
        "trial-001: eval_loss 0.5000 after 1,000 examples",
        "trial-001 failed: Diverged: step 3 [2/3 trials; lowest so far 1.2500 (trial-000); about "
        "75 s left]",
    ]


def test_a_terminal_gets_a_table_that_fits_it() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, height=20)
    assert isinstance(progress_for(print, 30, console), LiveTable)
    progress = LiveTable(console, 30, chain([0.0], repeat(60.0)).__next__)
    with progress.live():
        assert progress.table().caption == "none begun of 30 trials"
        for number in range(25):
            progress.started(f"trial-{number:03d}", {"train.lr": 0.1})
        progress.reported("trial-024", 10, 1.5)
        progress.finished("trial-024", "completed", 1.4, None)
    table = progress.table()
    assert table.row_count == 14
    begun = "24 running, 1 completed of 30 trials; lowest so far 1.5000 (trial-024)"
    assert table.caption == f"{begun}; about 29 min left"
