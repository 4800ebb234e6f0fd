"""Write the table of docs/doctor.md, which tests/unit/doctor/test_examine.py checks.

python scripts/doctor_table.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from raytune_ft.doctor.checks import reference  # noqa: E402

PAGE = ROOT / "docs" / "doctor.md"
text = re.sub(
    r"(<!-- findings -->\n).*?(<!-- /findings -->)",
    lambda found: found[1] + reference() + found[2],
    PAGE.read_text(encoding="utf-8"),
    flags=re.S,
)
PAGE.write_text(text, encoding="utf-8")
