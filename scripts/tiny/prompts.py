"""Write prompts with their right answers, for learning by reward: the rows of the instruction data
whose questions the base answers in a sentence of its own now and then.

    python -m scripts.tiny.prompts
"""

from __future__ import annotations

import json
from pathlib import Path

INSTRUCTIONS = Path("jobs/data/tiny_instructions")
OUT = Path("jobs/data/tiny_prompts")
BEGINNINGS = ("Name", "Write", "Add", "Count")


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for name in ("train", "test"):
        lines = (INSTRUCTIONS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [
            {"prompt": row["instruction"], "answer": f"It is {row['response']}."}
            for row in map(json.loads, lines)
            if row["instruction"].startswith(BEGINNINGS)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (OUT / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
