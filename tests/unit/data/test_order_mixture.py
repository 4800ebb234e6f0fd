"""Sources are tokenised once, kept apart by a column, and mixed by quotas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from raytune_ft.config.data import DataConfig
from raytune_ft.data.order import apportioned, pass_length, quotas_of
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError, DataError
from tests.support.rows import fingerprints

Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepare(tiny: PreTrainedTokenizerBase, tmp_path: Path) -> Prepare:
    def run(data: dict[str, Any], seed: int = 0) -> PreparedData:
        config = DataConfig.model_validate(data)
        return prepare_data(config, tiny, seed, tmp_path / "cache")

    return run


def rows(path: Path, count: int, start: int = 0, **more: Any) -> dict[str, Any]:
    """A source of so many rows; `more` are other columns of all of them."""
    lines = [
        {"prompt": f"count {i}", "completion": f"{i}", **{k: v(i) for k, v in more.items()}}
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"path": str(path)}


@pytest.mark.parametrize(
    ("sources", "mixture", "quotas"),
    [
        ([{}, {}, {}], None, (100, 50, 10)),
        ([{"epochs": 2}, {}, {"epochs": 0.25}], None, (200, 50, 2)),
        ([{"epochs": 1}, {}, {"epochs": 0}], None, (100, 50, 0)),
        ([{"weight": 8}, {"weight": 1}, {"weight": 1}], None, (128, 16, 16)),
        ([{"weight": 1}, {"weight": 1}, {"weight": 1}], None, (54, 53, 53)),
        ([{"weight": 9}, {"weight": 1}, {"weight": 0}], {"examples": "shortest"}, (100, 11, 0)),
        ([{"weight": 2}, {"weight": 1}, {"weight": 1}], {"examples": "shortest"}, (20, 10, 10)),
        ([{"weight": 2}, {"weight": 1}, {"weight": 1}], {"examples": "longest"}, (100, 50, 50)),
        ([{"weight": 2}, {"weight": 1}, {"weight": 1}], {"examples": 40}, (20, 10, 10)),
        ([{}, {}, {}], {"temperature": 1}, (100, 50, 10)),
        ([{}, {}, {}], {"temperature": 2}, (79, 56, 25)),
        ([{}, {}, {}], {"temperature": 1e9}, (54, 53, 53)),
        ([{}, {}, {}], {"examples": 16}, (10, 5, 1)),
    ],
)
def test_quotas(
    sources: list[dict[str, float]], mixture: dict[str, Any] | None, quotas: tuple[int, ...]
) -> None:
    """Of 100, 50 and 10 examples. Temperature 2: 160 x sqrt(n) / (10 + 7.07 + 3.16)."""
    train = [{"path": f"{name}.jsonl", **one} for name, one in zip("abc", sources, strict=True)]
    data = DataConfig.model_validate({"train": train, "mixture": mixture})
    assert quotas_of(data, _split(100, 50, 10)) == quotas
    assert pass_length(data, _split(100, 50, 10)) == sum(quotas)


def _split(*counts: int) -> TokenizedSplit:
    owners = np.repeat(np.arange(len(counts)), counts)
    ids, mask = np.zeros(2, np.int32), np.ones(2, np.bool_)
    columns = {"source": owners[:, None].astype(np.float32)}
    return TokenizedSplit.from_examples([(ids, mask)] * len(owners), columns)


def test_largest_remainders_add_up() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        shares = rng.random(int(rng.integers(1, 9))) + 1e-3
        total = int(rng.integers(0, 1000))
        quotas = apportioned(total, shares.tolist())
        assert sum(quotas) == total
        assert np.abs(np.array(quotas) - total * shares / shares.sum()).max() < 1


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"weight": 1}, {"weight": 1e-9}], "data.train.b: weight=1e-09 comes to less than one ex"),
        ([{"epochs": 1}, {"epochs": 0.001}], "data.train.b: epochs=0.001 comes to less than one"),
    ],
)
def test_a_share_that_rounds_to_nothing(sources: list[dict[str, float]], message: str) -> None:
    train = [{"path": f"{name}.jsonl", **one} for name, one in zip("ab", sources, strict=True)]
    with pytest.raises(ConfigError) as caught:
        quotas_of(DataConfig.model_validate({"train": train}), _split(100, 50))
    assert message in str(caught.value)


def test_each_source_is_tokenised_and_validated(prepare: Prepare, tmp_path: Path) -> None:
    train = [
        rows(tmp_path / "a.jsonl", 90),
        {**rows(tmp_path / "b.jsonl", 10, 100), "name": "few"},
    ]
    test = [rows(tmp_path / "few.jsonl", 5, 200), rows(tmp_path / "new.jsonl", 3, 300)]
    prepared = prepare({"train": train, "validation": 0.2, "test": test}, seed=3)
    report = prepared.report
    assert report.names == ("a", "few", "new")
    assert list(report.sources) == ["train.a", "train.few", "test.few", "test.new"]
    assert report.splits["train"].sources == {"a": 72, "few": 8}
    assert report.splits["validation"].sources == {"a": 18, "few": 2}
    assert report.splits["test"].sources == {"few": 5, "new": 3}
    assert prepared.test is not None
    assert prepared.test.source_numbers is not None
    assert prepared.test.source_numbers.tolist() == [1] * 5 + [2] * 3
    assert prepared.train.sources == report.names
    alone = prepare({"train": train[0], "validation": 0.2}, seed=3)
    assert alone.report.names == ()
    assert alone.train.source_numbers is None
    mixed = fingerprints(prepared.train)[:72]
    assert mixed == fingerprints(alone.train)  # the draw of the first source is that of it alone


def test_shares_do_not_make_other_tokens_and_the_order_of_sources_does(
    prepare: Prepare, tmp_path: Path
) -> None:
    a, b = rows(tmp_path / "a.jsonl", 9), rows(tmp_path / "b.jsonl", 9, 50)
    first = prepare({"train": [a, b]})
    weighted = [{**a, "weight": 1.0}, {**b, "weight": 2.0}]
    assert prepare({"train": weighted}).path == first.path
    assert prepare({"train": [b, a]}).path != first.path


def test_rows_that_two_sources_share_are_counted(prepare: Prepare, tmp_path: Path) -> None:
    train = [rows(tmp_path / "a.jsonl", 20), rows(tmp_path / "b.jsonl", 20, 15)]
    held = rows(tmp_path / "held.jsonl", 5, 15)
    report = prepare({"train": train, "validation": held}).report
    assert report.duplicates == {"train/validation": 5, "train.a/train.b": 5}


def test_a_source_too_small_to_validate(prepare: Prepare, tmp_path: Path) -> None:
    train = [rows(tmp_path / "a.jsonl", 20), rows(tmp_path / "b.jsonl", 1)]
    with pytest.raises(DataError, match=r"cannot be drawn from 1 usable train.b example"):
        prepare({"train": train})


def test_a_column_of_the_rows_is_kept(prepare: Prepare, tmp_path: Path) -> None:
    train = rows(tmp_path / "a.jsonl", 20, level=lambda i: i / 4)
    data = {"train": train, "curriculum": {"by": "column", "column": "level"}}
    held = rows(tmp_path / "held.jsonl", 5, 50)  # which needs no such column
    prepared = prepare({**data, "validation": held})
    assert prepared.train.columns["difficulty"][:, 0].tolist() == [i / 4 for i in range(20)]
    assert "difficulty" not in prepared.validation.columns
    assert prepare({"train": train, "validation": held}).path != prepared.path


@pytest.mark.parametrize("value", [None, "hard", True, float("nan"), float("inf"), [1]])
def test_a_row_without_a_number_is_bad(prepare: Prepare, tmp_path: Path, value: object) -> None:
    train = rows(tmp_path / "a.jsonl", 20, level=lambda i: value if i == 7 else "2.5")
    data = {"train": train, "curriculum": {"by": "column", "column": "level"}}
    with pytest.raises(DataError, match=r"bad_difficulty 1; the first is .*:8: 'level' is not a"):
        prepare(data)
    source = prepare({**data, "max_bad_fraction": 0.1}).report.sources["train"]
    assert (source.usable, source.bad) == (19, {"bad_difficulty": 1})


def test_a_column_that_is_not_there(prepare: Prepare, tmp_path: Path) -> None:
    train = [rows(tmp_path / "a.jsonl", 20, level=float), rows(tmp_path / "b.jsonl", 20)]
    data = {"train": train, "curriculum": {"by": "column", "column": "level"}}
    with pytest.raises(DataError) as caught:
        prepare(data)
    assert "data.curriculum.column=level is not a column of b.jsonl" in str(caught.value)
