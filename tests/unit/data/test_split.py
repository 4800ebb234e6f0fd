from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raytune_ft.data.report import length_counts
from raytune_ft.data.split import PARTS, TokenizedSplit, length_range
from raytune_ft.errors import RunFailed
from tests.support.rows import fingerprints


def random_examples(seed: int, count: int = 50) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, count)
    return [
        (rng.integers(0, 500, n, dtype=np.int32), rng.integers(0, 2, n).astype(bool))
        for n in lengths
    ]


def test_written_and_opened_again_it_is_the_same(tmp_path: Path) -> None:
    examples = random_examples(0)
    split = TokenizedSplit.from_examples(examples)
    split.write(tmp_path / "a.arrow")
    opened = TokenizedSplit.open(tmp_path / "a.arrow")
    assert len(opened) == len(examples)
    assert opened.sha256 == split.sha256
    for i, (ids, mask) in enumerate(examples):
        got_ids, got_mask = opened.example(i)
        np.testing.assert_array_equal(got_ids, ids)
        np.testing.assert_array_equal(got_mask, mask)
    types = (opened.input_ids.dtype, opened.label_mask.dtype, opened.offsets.dtype)
    assert types == (np.int32, np.bool_, np.int64)


def test_opening_maps_the_file_and_copies_nothing(tmp_path: Path) -> None:
    split = TokenizedSplit.from_examples(random_examples(1, 2000))
    split.write(tmp_path / "a.arrow")
    before = pa.total_allocated_bytes()
    opened = TokenizedSplit.open(tmp_path / "a.arrow")
    assert pa.total_allocated_bytes() - before < 4096
    assert not opened.input_ids.flags.owndata
    assert not opened.input_ids.flags.writeable
    assert not opened.label_mask.flags.owndata


def test_lengths_and_label_counts_are_those_of_the_examples() -> None:
    examples = random_examples(2)
    split = TokenizedSplit.from_examples(examples)
    assert split.lengths.tolist() == [len(ids) for ids, _ in examples]
    assert split.label_counts.tolist() == [int(mask[1:].sum()) for _, mask in examples]


def test_an_example_without_tokens_has_no_labels() -> None:
    empty = (np.zeros(0, np.int32), np.zeros(0, bool))
    full = (np.array([1, 2], np.int32), np.array([True, True]))
    split = TokenizedSplit.from_examples([empty, full, empty])
    assert split.label_counts.tolist() == [0, 1, 0]


def test_a_split_without_examples_can_be_written(tmp_path: Path) -> None:
    TokenizedSplit.from_examples([]).write(tmp_path / "a.arrow")
    opened = TokenizedSplit.open(tmp_path / "a.arrow")
    assert len(opened) == 0
    assert opened.label_counts.tolist() == []


def test_the_hash_sees_ids_masks_boundaries_and_order() -> None:
    ids, mask = np.array([1, 2, 3, 4], np.int32), np.array([False, True, True, True])
    variants = [
        [(ids, mask)],
        [(ids[::-1], mask)],
        [(ids, ~mask)],
        [(ids[:2], mask[:2]), (ids[2:], mask[2:])],
        [(ids[2:], mask[2:]), (ids[:2], mask[:2])],
    ]
    assert len({TokenizedSplit.from_examples(one).sha256 for one in variants}) == len(variants)


def test_fingerprints_tell_equal_examples() -> None:
    ids, mask = np.array([1, 2], np.int32), np.array([False, True])
    split = TokenizedSplit.from_examples([(ids, mask), (ids, ~mask), (ids, mask), (ids + 1, mask)])
    first, second, third, fourth = fingerprints(split)
    assert first == third
    assert len({first, second, fourth}) == 3


@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.arrow"
    TokenizedSplit.from_examples(random_examples(3)).write(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "missing":
        path.unlink()
    else:
        with pa.OSFile(str(path), "wb") as sink:
            batch = pa.record_batch({"x": [1]})
            with pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
    with pytest.raises(RunFailed, match=r"a\.arrow"):
        TokenizedSplit.open(path)


def test_columns_are_written_mapped_and_part_of_the_content(tmp_path: Path) -> None:
    examples = random_examples(1, 5)
    weights = np.arange(5, dtype=np.float32)[:, None]
    targets = np.random.default_rng(0).random((5, 3), np.float32)
    split = TokenizedSplit.from_examples(examples, {"weight": weights, "target": targets})
    split.write(tmp_path / "a.arrow")
    read = TokenizedSplit.open(tmp_path / "a.arrow")
    assert read.columns.keys() == split.columns.keys()
    assert np.array_equal(read.columns["weight"], weights)
    assert np.array_equal(read.columns["target"], targets)
    plain = TokenizedSplit.from_examples(examples)
    other = TokenizedSplit.from_examples(examples, {"weight": weights + 1, "target": targets})
    assert len({plain.sha256, split.sha256, other.sha256, read.sha256}) == 3


@pytest.mark.parametrize("limit", [5, 12, 60, 1000])
def test_length_counts_are_those_of_a_histogram(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.data.arrays.BLOCK", 7)
    lengths = np.random.default_rng(limit).integers(1, 61, 100)
    split = TokenizedSplit.from_examples(
        [(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths]
    )
    found, low = length_counts(split, limit), 0
    assert sum(count for _, count in found) == 100
    for high, count in found:
        assert count == sum(low < n <= high for n in lengths.tolist())
        low = high
    assert low == lengths.max()
    assert length_range(split.offsets) == (lengths.min(), lengths.max())


def test_labels_of_some_are_those_of_all() -> None:
    draw = np.random.default_rng(0)
    examples = [(np.zeros(n, np.int32), draw.random(n) < 0.5) for n in draw.integers(1, 20, 50)]
    split = TokenizedSplit.from_examples(examples)
    expected = [int(mask[1:].sum()) for _, mask in examples]
    assert split.label_counts.tolist() == expected
    indices = [7, 0, 49, 7]
    assert split.labels_of(indices).tolist() == [expected[i] for i in indices]
    halves = []
    for ids, mask in examples:
        middle = len(ids) // 2
        mask[[0, middle]] = False  # the first token of a sequence is no label
        halves.append((middle, len(ids) - middle))
    pairs = TokenizedSplit.from_examples(examples, {PARTS: np.array(halves, np.float32)})
    assert pairs.labels_of(indices).tolist() == pairs.label_counts[indices].tolist()
    numbers = np.array([3, 99, 0])
    assert pairs.part_labels_of(numbers).tolist() == np.diff(pairs.part_labels)[numbers].tolist()
