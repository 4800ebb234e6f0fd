"""The loss of every training example under the model before training, for a curriculum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from raytune_ft.data.derived import derived
from raytune_ft.data.order import Numbers
from raytune_ft.data.prepare import BASE_LOSS, PreparedData, sha256_of_numbers
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

    def add(folder: Path) -> dict[str, str]:
        losses = measure(prepared.train).astype(np.float32)
        np.save(folder / BASE_LOSS, losses)
        return {"base_loss": sha256_of_numbers(losses)}

    return derived(prepared, model_sha256, add)
