"""Whether checkpoints can be merged at all, asked of their small files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytune_ft.errors import ModelError
from raytune_ft.merge.adapter_plan import ADAPTER_CONFIG

REMEDY = "merge checkpoints of one base"


def check_members(base: Path, members: Sequence[Path]) -> None:
    """
    Raises:
        ModelError: adapters name different bases, or a tokenizer is not the base's.
    """
    named: dict[str, Path] = {}
    for member in members:
        config = _json(member / ADAPTER_CONFIG)
        if config and config.get("base_model_name_or_path"):
            named.setdefault(_real(config["base_model_name_or_path"]), member)
        _check_tokenizer(base, member)
    if len(named) > 1:
        (one, first), (other, second) = list(named.items())[:2]
        raise ModelError(
            str(second),
            f"is an adapter of {other}, and {first} is one of {one}",
            REMEDY,
        )


def _check_tokenizer(base: Path, member: Path) -> None:
    """Rows of the embedding mean what the tokenizer says: another one makes a sum of nothing."""
    ours, theirs = _json(base / "tokenizer.json"), _json(member / "tokenizer.json")
    if ours and theirs and _vocabulary(ours) != _vocabulary(theirs):
        raise ModelError(
            str(member / "tokenizer.json"),
            f"is another tokenizer than the one in {base}",
            "merge checkpoints that share their tokenizer",
        )


def _vocabulary(tokenizer: dict[str, Any]) -> Any:
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    return tokenizer.get("model", {}).get("vocab"), added


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _real(name: str) -> str:
    return os.path.realpath(name) if os.path.isdir(name) else name
