"""The loss of every training example under the model before training, for a curriculum."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from raytune_ft.data.cache import keep_folder
from raytune_ft.data.order import Numbers
from raytune_ft.data.prepare import BASE_LOSS, REPORT, PreparedData, open_prepared, sound_at
from raytune_ft.data.split import TokenizedSplit


def with_base_loss(
    prepared: PreparedData, model_sha256: str, measure: Callable[[TokenizedSplit], Numbers]
) -> PreparedData:
    """The same data with the loss of every training example under the model of that hash.

    It is measured once and kept in a folder of its own: on another machine, or under another
    layout, it would differ in its last digits, and examples of about equal losses would change
    places.

    Raises:
        StorageError: it cannot be written.
    """
    named = f"{prepared.path.name} {model_sha256}"
    target = prepared.path.with_name(hashlib.sha256(named.encode()).hexdigest())
    found = sound_at(target)
    if found is not None:
        return found
    losses = measure(prepared.train).astype(np.float32)
    digest = hashlib.sha256(losses.tobytes()).hexdigest()

    def fill(folder: Path) -> None:
        for name in prepared.report.splits:
            shutil.copyfile(prepared.path / f"{name}.arrow", folder / f"{name}.arrow")
        np.save(folder / BASE_LOSS, losses)
        (folder / REPORT).write_text(replace(prepared.report, base_loss=digest).to_json())

    keep_folder(target, fill, lambda: sound_at(target) is not None)
    return open_prepared(target)
