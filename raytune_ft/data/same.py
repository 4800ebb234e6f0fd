"""Whether the data of a run are still what they were when it began."""

from __future__ import annotations

from pathlib import Path

from raytune_ft.data.report import DataReport, SplitReport
from raytune_ft.errors import DataError, StorageError


def check_same(saved: Path, now: DataReport) -> None:
    """Compares content: a moved source and tokens that were made anew are the same data.

    Raises:
        DataError: a split has other examples than in the report at `saved`, or they have other
            losses under the base, or another teacher's logits.
        StorageError: there is no report at `saved`.
    """
    try:
        before = DataReport.from_json(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            str(saved), "is no data report", "bring it back, or write another name"
        ) from error
    for name in {**before.splits, **now.splits}:
        old, new = before.splits.get(name), now.splits.get(name)
        if _sha256(old) != _sha256(new):
            raise DataError(
                f"data.{name} with {_shown(new)}",
                f"is not what the run began with, {_shown(old)}",
                "bring back the rows that it had, or train under another name",
            )
    if before.base_loss and now.base_loss and before.base_loss != now.base_loss:
        raise DataError(
            f"data.curriculum with losses of sha256 {now.base_loss[:12]}",
            f"is not what the run began with, {before.base_loss[:12]}: measured again, they put "
            "examples in another order",
            "bring back the token cache that it had, or train under another name",
        )
    if before.teacher and now.teacher and before.teacher != now.teacher:
        raise DataError(
            f"train.kd.teacher with files of sha256 {now.teacher[:12]}",
            f"is not what the run began with, {before.teacher[:12]}",
            "bring back the weights that it had, or train under another name",
        )


def _sha256(split: SplitReport | None) -> str | None:
    return split.sha256 if split else None


def _shown(split: SplitReport | None) -> str:
    return f"{split.examples:,} examples (sha256 {split.sha256[:12]})" if split else "nothing"
