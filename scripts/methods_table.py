"""Write the table of docs/methods.md, which tests/distributed/test_methods.py checks.

python scripts/methods_table.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.methods import support_table  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
text = re.sub(
    r"(<!-- matrix -->\n).*?(<!-- /matrix -->)",
    lambda found: found[1] + support_table() + found[2],
    PAGE.read_text(encoding="utf-8"),
    flags=re.S,
)
PAGE.write_text(text, encoding="utf-8")
