"""Tokens with something beside them that a model was run for, in a folder of their own."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytune_ft.data.cache import keep_folder
from raytune_ft.data.prepare import REPORT, PreparedData, open_prepared, sound_at


def derived(
    prepared: PreparedData, sha256: str, add: Callable[[Path], dict[str, Any]]
) -> PreparedData:
    """What an earlier call of this hash left; else the files of `prepared` and what `add` writes
    beside them. It returns the fields of the report that say so.

    Raises:
        StorageError: they cannot be written.
    """
    named = f"{prepared.path.name} {sha256}"
    target = prepared.path.with_name(hashlib.sha256(named.encode()).hexdigest())
    found = sound_at(target)
    if found is not None:
        return found

    def fill(folder: Path) -> None:
        for file in prepared.path.iterdir():
            shutil.copyfile(file, folder / file.name)
        report = replace(prepared.report, **add(folder))
        (folder / REPORT).write_text(report.to_json())

    keep_folder(target, fill, lambda: sound_at(target) is not None)
    return open_prepared(target)
