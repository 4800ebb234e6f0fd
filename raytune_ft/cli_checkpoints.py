"""`raytune-ft checkpoints`: list, verify, prune."""

from __future__ import annotations

from typing import Annotated

import typer

from raytune_ft.errors import CheckpointError
from raytune_ft.report import terminal as show

app = typer.Typer(
    help="List, verify and prune the checkpoints of a run or a sweep.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Where = Annotated[
    str, typer.Argument(metavar="DIR", help="A run, a sweep, or s3://bucket/prefix/NAME.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command("list")
def list_(where: Where, debug: Debug = False) -> None:
    """Every checkpoint with its step, metrics and size, and whether something refers to it.

    Example: raytune-ft checkpoints list runs/quickstart
    """
    from raytune_ft.checkpoints.manage import listed

    show.console().print(show.checkpoints_table(listed(where)))


@app.command()
def verify(where: Where, debug: Debug = False) -> None:
    """Read every byte; a damaged checkpoint is moved aside and named, with exit code 1.

    Example: raytune-ft checkpoints verify runs/quickstart
    """
    from raytune_ft.checkpoints.manage import verified

    rows = verified(where, show.tell)
    damaged = [row for row in rows if row.error]
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(rows)} checkpoints are damaged")
    show.tell(f"{len(rows)} checkpoints are as they were written")


@app.command()
def prune(
    where: Where,
    keep_last: Annotated[
        int | None, typer.Option("--keep-last", min=1, help="Default: the run's own.")
    ] = None,
    keep_best: Annotated[
        int | None, typer.Option("--keep-best", min=1, help="Default: the run's own.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
    debug: Debug = False,
) -> None:
    """Delete what the run's settings, or these, do not keep. What a result names always stays.

    Example: raytune-ft checkpoints prune runs/quickstart --keep-last 1 --dry-run
    """
    from raytune_ft.checkpoints.manage import pruned

    for path in pruned(where, keep_last, keep_best, dry_run, show.tell):
        show.tell(f"{'would delete' if dry_run else 'deleted'} {path}")
