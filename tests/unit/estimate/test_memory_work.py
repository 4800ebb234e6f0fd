"""What virtual tokens add to a worker's passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raytune_ft.config.schema import Config
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.estimate.memory import work_at_most, work_of
from tests.support.runs import make_config

LENGTHS = (2, 30, 3, 4, 2, 33, 5, 2)


def split(virtual: int) -> TokenizedSplit:
    rows = [np.arange(length + virtual, dtype=np.int32) for length in LENGTHS]
    return TokenizedSplit.from_examples(
        [(row, np.arange(len(row)) == len(row) - 1) for row in rows]
    )


def config(method: dict[str, object], packing: bool | str = "auto") -> Config:
    changes = {"method": method, "data.packing": packing, "data.max_length": 40}
    return make_config(
        Path("model"),
        Path("rows.jsonl"),
        {**changes, "train.batch_size": 8, "train.micro_tokens": 90, "train.max_examples": 8},
    )


def test_virtual_tokens_are_as_long_as_real_ones() -> None:
    longer = work_of(config({"name": "lora"}), split(5), 1, "cpu")
    assert work_of(config({"name": "prompt", "tokens": 5}), split(0), 1, "cpu") == longer
    assert work_at_most(config({"name": "p_tuning", "tokens": 5}), 1, "cpu").width == 45


def test_a_prefix_has_a_row_for_each_example() -> None:
    apart = work_of(config({"name": "lora"}, packing=False), split(5), 1, "cpu")
    assert work_of(config({"name": "prefix", "tokens": 5}), split(0), 1, "cpu") == apart
    assert apart != work_of(config({"name": "lora"}), split(5), 1, "cpu")
