"""Whether what is measured on was trained on: prompts that two splits share, as people read them.

Identical examples are counted elsewhere; a leak is more often the same question with another blank,
another capital or another answer. Signs count: 48/2 is not 48*2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from raytune_ft.config.data import DataConfig, SourceConfig
from raytune_ft.data.report import DataReport
from raytune_ft.data.rows import Row
from raytune_ft.errors import DataError


def prompt_key(source: SourceConfig, row: Row) -> bytes:
    """A hash of what the row asks; equal where only case and blanks differ."""
    text = PROMPTS[source.format](source, row)
    normal = " ".join(text.casefold().split())
    return hashlib.blake2b(normal.encode(), digest_size=16).digest()


def count_overlaps(prompts: Mapping[str, Sequence[bytes]]) -> dict[str, int]:
    """For every pair "a/b" of splits, how many examples of b have a prompt that a has too."""
    known = {name: set(keys) for name, keys in prompts.items()}
    return {
        f"{a}/{b}": sum(key in known[a] for key in prompts[b]) for a, b in combinations(prompts, 2)
    }


def check_overlap(data: DataConfig, report: DataReport, limit: float) -> None:
    """Refuse to measure on what was trained on, or to choose on what is measured in the end.

    A validation split that is drawn from train is as repetitive as train is, and is not refused.

    Raises:
        DataError: more than `limit` of a split's prompts stand in one that comes before it.
    """
    for pair, count in report.overlaps.items():
        other, name = pair.split("/")
        total = report.splits[name].examples
        if name == "validation" and isinstance(data.validation, float):
            continue
        if count > limit * total:
            why = (
                "selecting on the test set is refused"
                if other == "validation"
                else "what was trained on measures memory"
            )
            raise DataError(
                f"data.{name}",
                f"shares {count:,} of its {total:,} prompts with data.{other}, more than "
                f"promote.max_overlap={limit:g} allows ({why})",
                f"take them out of data.{other}, or raise promote.max_overlap",
            )


def _turns(source: SourceConfig, row: Row) -> str:
    """Everything before the last turn of the assistant."""
    turns: list[dict[str, Any]] = row.values[source.messages]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    return "\n".join(str(turn.get("content") or "") for turn in turns[:last])


PROMPTS: dict[str, Callable[[SourceConfig, Row], str]] = {
    "prompt_completion": lambda source, row: str(row.values[source.prompt]),
    "messages": _turns,
    "text": lambda source, row: str(row.values[source.text]),
    "classification": lambda source, row: "\n".join(
        str(row.values[column]) for column in (source.text, source.text_pair) if column is not None
    ),
    "rationale": lambda source, row: str(row.values[source.prompt]),
}
