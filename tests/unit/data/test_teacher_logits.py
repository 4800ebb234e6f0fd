"""Losses of the base beside the tokens: measured once, and again where they were damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from raytune_ft.config.data import DataConfig
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.data.teacher_logits import with_base_loss
from raytune_ft.layout import BASE_LOSS
from tests.support.runs import write_rows


@pytest.mark.parametrize("damage", ["none", "a bit", "a header", "a row"])
def test_losses_are_measured_once_and_damaged_ones_again(
    damage: str, tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 12)
    data = DataConfig.model_validate({"train": {"path": str(file)}, "validation": 0.25})
    prepared = prepare_data(data, tiny, 0, tmp_path / "cache")
    measured: list[int] = []

    def measure(split: TokenizedSplit) -> np.ndarray:
        measured.append(len(split))
        return np.linspace(1, 2, len(split))

    kept = with_base_loss(prepared, "model", measure)
    path = kept.path / BASE_LOSS
    if damage == "a row":
        np.save(path, np.ones(3, np.float32))
    elif damage != "none":
        whole = bytearray(path.read_bytes())
        whole[-1 if damage == "a bit" else 0] ^= 1
        path.write_bytes(whole)
    again = with_base_loss(prepared, "model", measure)
    assert measured == [9] * (1 if damage == "none" else 2)
    assert again.base_loss is not None
    assert again.base_loss.tolist() == np.linspace(1, 2, 9, dtype=np.float32).tolist()
    assert again.report == kept.report
