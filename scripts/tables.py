"""Write a generated table into its page under docs/, which a test checks.

python scripts/tables.py doctor    (checked by tests/unit/doctor/test_examine.py)
python scripts/tables.py methods   (checked by tests/distributed/test_methods.py)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def findings() -> str:
    """What `doctor` may find."""
    from raytune_ft.doctor.checks import reference

    return reference()


def matrix() -> str:
    """What is supported for each method. Needs torch, which the other one does not."""
    from tests.support.methods import support_table

    return support_table()


TABLES = {"doctor": findings, "methods": matrix}
"""Name of the page -> its table, which stands between the marks of the function's name."""


def write(name: str) -> None:
    """The table of one page."""
    table = TABLES[name]
    mark = table.__name__
    page = ROOT / "docs" / f"{name}.md"
    text = re.sub(
        rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
        lambda found: found[1] + table() + found[2],
        page.read_text(encoding="utf-8"),
        flags=re.S,
    )
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1])
