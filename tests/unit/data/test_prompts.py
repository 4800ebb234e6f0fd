"""Prompts are those of training, with the columns of their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.data import DataConfig
from raytune_ft.config.schema import ModelConfig
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prompts import of_file, of_split
from raytune_ft.errors import DataError
from raytune_ft.model.load import load_tokenizer

ASKED = [{"role": "user", "content": "a</s>b"}]
SAID = [{"role": "assistant", "content": "cd"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "completion": f"c{i}", "n": i} for i in range(count)]


@pytest.fixture
def tokenizer(inputs: tuple[Path, Path]) -> Any:
    return load_tokenizer(ModelConfig(path=str(inputs[0])))


def data_of(train: Path, source: dict[str, Any] | None = None, **keys: Any) -> DataConfig:
    given = {"train": {"path": str(train), **(source or {})}, "validation": 0.5, **keys}
    return DataConfig.model_validate(given)


def test_of_a_split_they_are_those_of_training(tokenizer: Any, tmp_path: Path) -> None:
    data = data_of(write(tmp_path / "rows.jsonl", texts(20)))
    prepared = prepare_data(data, tokenizer, 3, tmp_path / "cache")
    found = of_split(data, prepared, "validation", tokenizer)
    assert len(found) == len(prepared.validation)
    for i, one in enumerate(found):
        ids, mask = prepared.validation.example(i)
        assert one.ids == tuple(ids[~mask].tolist())
        assert one.reference == tuple(ids[mask].tolist())
        assert one.text == one.written == f"p{one.columns['n']}"
        assert one.origin == f"rows.jsonl:{one.columns['n'] + 1}"


def test_several_sources(tokenizer: Any, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", texts(4)) for name in "ab"]
    data = data_of(paths[0], test=[{"path": str(path)} for path in paths])
    prepared = prepare_data(data, tokenizer, 0, tmp_path / "cache")
    found = of_split(data, prepared, "test", tokenizer)
    assert [one.origin for one in found] == [f"{a}.jsonl:{i}" for a in "ab" for i in range(1, 5)]


def test_the_row_of_each_example(tokenizer: Any, tmp_path: Path) -> None:
    """Of a draw from two sources with unusable rows and rows of several examples, cut anyhow."""
    turns = [*ASKED, *SAID, *ASKED, *SAID]
    for name, first in (("a", 0), ("b", 100)):
        rows = [{"messages": turns[: 2 + 2 * (i % 2)], "n": first + i} for i in range(40)]
        rows[7], rows[20] = {"messages": [], "n": -1}, {"messages": ASKED, "n": -2}
        write(tmp_path / f"{name}.jsonl", rows)
    source = {"format": "messages", "chat_template": "chatml"}
    sources = [{"path": f"{tmp_path}/{name}.jsonl", **source} for name in "ab"]
    data = DataConfig.model_validate({"train": sources, "validation": 0.3, "max_bad_fraction": 0.2})
    known = [*range(40), *range(100, 140)]
    for size in (None, 200):
        prepared = prepare_data(data, tokenizer, 1, tmp_path / f"cache-{size}", piece_bytes=size)
        seen = []
        for name in ("train", "validation"):
            found = of_split(data, prepared, name, tokenizer)
            rows_n = prepared.rows(name)
            assert len(rows_n) == len(prepared.all_splits[name])
            numbers = [one.columns["n"] for one in found]
            assert numbers == list(dict.fromkeys(known[row] for row in rows_n))
            ids, mask = prepared.all_splits[name].example(0)
            assert found[0].ids == tuple(ids[: mask.argmax()].tolist())
            seen += numbers
        assert len(seen) == len(set(seen)) == 76
        assert set(seen) == set(known) - {7, 20, 107, 120}


def test_a_conversation_ends_before_the_answer(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [*ASKED, *SAID], "key": 7}, {"messages": [*ASKED, *SAID]}]
    source = {"format": "messages", "chat_template": "chatml"}
    path = write(tmp_path / "chat.jsonl", rows)
    data = data_of(path, source)
    prepared = prepare_data(data, tokenizer, 0, tmp_path / "cache")
    one = of_split(data, prepared, "validation", tokenizer)[0]
    assert one.written == ASKED
    # The same prompt in a file of its own, with and without the answer, gives the same tokens.
    alone = write(tmp_path / "asked.jsonl", [{"messages": ASKED}, {"prompt": ASKED}, rows[0]])
    found = of_file(alone, data, tokenizer)
    assert [other.ids for other in found] == [one.ids] * 3
    assert [other.written for other in found] == [ASKED] * 3
    assert [tokenizer.decode(other.reference) for other in found] == ["", "", "cd"]
    assert found[2].columns["key"] == 7


ANSWER, OTHER = [{"role": "assistant", "content": "no"}], [{"role": "system", "content": "s"}]


@pytest.mark.parametrize(
    ("format", "row", "written"),
    [
        ("preference", {"prompt": "a", "chosen": "cd", "rejected": "e"}, "a"),
        ("preference", {"prompt": ASKED, "chosen": SAID, "rejected": ANSWER}, ASKED),
        ("preference", {"chosen": ASKED + SAID, "rejected": ASKED + ANSWER}, ASKED),
        (
            "preference",
            {"system": "s", "prompt": "a", "chosen": "cd", "rejected": "e"},
            [*OTHER, {"role": "user", "content": "a"}],
        ),
        (
            "preference",
            {"instruction": "a", "input": "b", "chosen": "cd", "rejected": "e"},
            [{"role": "user", "content": "a\nb"}],
        ),
        ("unpaired", {"prompt": "a", "completion": "cd", "label": True}, "a"),
        ("unpaired", {"prompt": ASKED, "completion": SAID, "label": False}, ASKED),
    ],
)
def test_prompts_of_preferences(
    format: str, row: dict[str, Any], written: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = write(tmp_path / "rows.jsonl", [row] * 4)
    data = data_of(rows, {"format": format, "chat_template": "chatml"})
    data = data.model_copy(update={"test": data.train, "validation": data.train})
    prepared = prepare_data(data, tokenizer, 0, tmp_path / "cache")
    found = of_split(data, prepared, "test", tokenizer)
    assert [one.written for one in found] == [written] * 4
    assert prepared.test is not None
    ids, mask = prepared.test.sequence(0)
    assert found[0].ids == tuple(ids[: mask.argmax()].tolist())
    assert tokenizer.decode(found[0].reference, skip_special_tokens=True).strip() == "cd"


def test_of_a_file_of_texts(tokenizer: Any, tmp_path: Path) -> None:
    train = write(tmp_path / "rows.jsonl", texts(20))
    data = data_of(train)
    prepared = prepare_data(data, tokenizer, 0, tmp_path / "cache")
    by_split = of_split(data, prepared, "validation", tokenizer)
    rows = [{"prompt": one.text} for one in by_split]
    found = of_file(write(tmp_path / "p.jsonl", rows), data, tokenizer)
    assert [one.ids for one in found] == [one.ids for one in by_split]
    assert {one.reference for one in found} == {()}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        ([{"question": "a"}], r"has 1 unusable rows of 1 \(the first is p.jsonl:1: no 'prompt'\)"),
        ([{"prompt": "a"}, {"prompt": ASKED}], "p.jsonl:2: the model's tokenizer has no chat"),
        ([{"prompt": 5}], "p.jsonl:1"),
    ],
)
def test_unusable_files(
    rows: list[dict[str, Any]], message: str, tokenizer: Any, tmp_path: Path
) -> None:
    data = data_of(write(tmp_path / "rows.jsonl", texts(4)))
    file = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(DataError, match=message):
        of_file(file, data, tokenizer)


def test_rows_that_went_after_they_were_tokenised(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", texts(20))
    prepared = prepare_data(data_of(path), tokenizer, 0, tmp_path / "cache")
    write(path, texts(4))
    with pytest.raises(DataError, match=r"data\.validation changed after it was tokenised"):
        of_split(data_of(path), prepared, "validation", tokenizer)


def test_documents_have_no_prompts(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "abc"}] * 4)
    data = data_of(path, {"format": "text"})
    prepared = prepare_data(data, tokenizer, 0, tmp_path / "cache")
    with pytest.raises(DataError, match="has no prompts to answer"):
        of_split(data, prepared, "validation", tokenizer)
