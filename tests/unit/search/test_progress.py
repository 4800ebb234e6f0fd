"""What a person sees of a sweep."""

from __future__ import annotations

import io
from itertools import chain, repeat

from rich.console import Console

from raytune_ft.config.objectives import LOSS, SEARCHABLE
from raytune_ft.search.progress import Lines, LiveTable, progress_for


def test_a_log_gets_a_line_for_everything() -> None:
    lines: list[str] = []
    assert isinstance(progress_for(print, 3, LOSS, Console(file=io.StringIO())), Lines)
    progress = Lines(lines.append, 3, LOSS, iter([0.0, 120.0, 150.0]).__next__)
    progress.started("trial-000", {"train.lr": 0.000123456, "method.rank": 8})
    progress.reported("trial-000", 0, 9.0)
    progress.reported("trial-000", 1000, 1.25)
    progress.finished("trial-000", "pruned", 1.25, None)
    progress.started("trial-001", {"train.lr": 1.0})
    progress.reported("trial-001", 0, 9.0)
    progress.reported("trial-001", 1000, 0.5)
    progress.finished("trial-001", "failed", None, "Diverged: step 3")
    assert lines == [
        "trial-000 started: train.lr=0.000123 method.rank=8",
        "trial-000: eval_loss 1.2500 after 1,000 examples",
        "trial-000 pruned, eval_loss 1.2500 [1/3 trials; best so far 1.2500 (trial-000); about "
        "4 min left]",
        "trial-001 started: train.lr=1.0000",
        "trial-001: eval_loss 0.5000 after 1,000 examples",
        "trial-001 failed: Diverged: step 3 [2/3 trials; best so far 1.2500 (trial-000); about "
        "75 s left]",
    ]


def test_a_terminal_gets_a_table_that_fits_it() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, height=20)
    assert isinstance(progress_for(print, 30, LOSS, console), LiveTable)
    progress = LiveTable(console, 30, LOSS, chain([0.0], repeat(60.0)).__next__)
    with progress.live():
        assert progress.table().caption == "none begun of 30 trials"
        for number in range(25):
            progress.started(f"trial-{number:03d}", {"train.lr": 0.1})
        progress.reported("trial-024", 0, 9.0)
        progress.reported("trial-024", 10, 1.5)
        progress.finished("trial-024", "completed", 1.4, None)
    table = progress.table()
    assert table.row_count == 14
    begun = "24 running, 1 completed of 30 trials; best so far 1.5000 (trial-024)"
    assert table.caption == f"{begun}; about 29 min left"


def caption(progress: LiveTable) -> str:
    return str(progress.table().caption).rpartition("; ")[2]


def test_time_left_is_that_of_the_work_which_is_left() -> None:
    """Of 20 trials, 16 train at the same time; the first one to end says little by itself."""
    clock = [0.0]
    progress = LiveTable(Console(file=io.StringIO()), 20, LOSS, lambda: clock[0])
    names = [f"trial-{number:03d}" for number in range(20)]
    for name in names[:16]:
        progress.started(name, {})
        progress.reported(name, 0, 9.0)
    clock[0] = 90.0
    for name in names[:16]:
        progress.reported(name, 900, 2.0)
    assert "left" not in caption(progress)
    clock[0] = 100.0
    progress.reported(names[0], 1000, 1.0)
    progress.finished(names[0], "completed", 1.0, None)
    # 14,500 examples took 100 s, and 15 x 100 + 4 x 1,000 are left.
    assert caption(progress) == "about 37.9 s left"


def test_time_left_counts_what_pruned_and_resumed_trials_really_trained() -> None:
    clock = [0.0]
    progress = LiveTable(Console(file=io.StringIO()), 6, LOSS, lambda: clock[0])
    progress.started("resumed", {})
    progress.reported("resumed", 800, 2.0)  # of an earlier driver
    clock[0] = 20.0
    progress.reported("resumed", 1000, 2.0)
    progress.finished("resumed", "completed", 2.0, None)
    assert caption(progress) == "about 8 min left"  # 5 x 1,000 examples at 10 a second
    for name in ("a", "b", "c"):
        progress.started(name, {})
        progress.reported(name, 0, 9.0)
        clock[0] += 10.0
        progress.reported(name, 100, 5.0)
        progress.finished(name, "pruned", 5.0, None)
    progress.started("d", {})
    progress.reported("d", 0, 9.0)
    clock[0] = 100.0
    progress.reported("d", 500, 4.0)
    # 1,000 examples in 100 s; 500 more, as of the one trial that was longer, and one of 325.
    assert caption(progress) == "about 82.5 s left"


def test_trials_that_fail_before_they_train_tell_no_time() -> None:
    progress = LiveTable(Console(file=io.StringIO()), 2, LOSS, lambda: 1.0)
    progress.started("a", {})
    progress.finished("a", "failed", None, "OutOfMemory")
    assert "left" not in caption(progress)


def test_the_best_is_by_the_figure_that_decides() -> None:
    lines: list[str] = []
    figure = SEARCHABLE["eval_reward_accuracy"]
    progress = Lines(lines.append, 2, figure, repeat(1.0).__next__)
    for name, value in (("trial-000", 0.7), ("trial-001", 0.6)):
        progress.started(name, {})
        progress.reported(name, 10, value)
    progress.finished("trial-001", "completed", 0.6, None)
    assert lines[-1].startswith("trial-001 completed, eval_reward_accuracy 0.6000 [1/2 trials; ")
    assert "best so far 0.7000 (trial-000)" in lines[-1]
