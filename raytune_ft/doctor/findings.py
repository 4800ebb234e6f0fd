"""What a check can find. Every text that the table of `doctor` may show is a `Finding`, except what
is well, so that docs/doctor.md can list all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from raytune_ft.report.tables import Table

Status = Literal["ok", "unknown", "warning", "defect"]
ALL = "all"


@dataclass(frozen=True)
class Row:
    """A line of the table; `node` is a name, or `ALL`."""

    status: Status
    node: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Finding:
    """Something that is not well: `says` with `{blanks}`, and what to do about it."""

    status: Status
    says: str
    remedy: str

    def on(self, node: str, **values: Any) -> Row:
        """The row of that node, with `values` in the blanks."""
        return Row(self.status, node, *(t.format(**values) for t in (self.says, self.remedy)))

    @property
    def template(self) -> tuple[str, str]:
        """Both texts for the documentation, with blanks in capitals."""
        says, remedy = (
            re.sub(r"\{(\w+)\}", lambda blank: blank[1].upper(), text)
            for text in (self.says, self.remedy)
        )
        return says, remedy


def well(found: str, node: str = ALL) -> Row:
    """The row of what is in order."""
    return Row("ok", node, found)


NO_ANSWER = Finding(
    "unknown",
    "cannot be checked: {reason}",
    "mend what else is found on the node, then look at the logs of Ray there",
)
"""Every check may find this."""


def table(rows: Iterable[tuple[str, Row]]) -> Table:
    """Rows with the names of their checks."""
    return Table(
        ("check", "status", "node", "found", "remedy"),
        tuple((check, row.status, row.node, row.found, row.remedy) for check, row in rows),
        words=5,
    )
