"""What is measured on was not trained on, however it was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.data import DataConfig, SourceConfig
from raytune_ft.config.schema import ModelConfig
from raytune_ft.data.formats import encode_rows
from raytune_ft.data.formats.example import Encoder, Example
from raytune_ft.data.prepare import prepare_data, use_chat_template
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.report import check_overlap
from raytune_ft.data.rows import Row
from raytune_ft.errors import DataError
from raytune_ft.model.load import load_tokenizer
from tests.support.models import save_tiny_llama


def key_of(source: SourceConfig, row: Row) -> bytes:
    tokenizer = load_tokenizer(ModelConfig(path="builtin:tiny"))
    use_chat_template(tokenizer, DataConfig(train=source))
    (found,) = encode_rows(Encoder.of(tokenizer), source, "\n", [row])
    assert isinstance(found, Example)
    return found.prompt


def key(text: str) -> bytes:
    return key_of(SourceConfig(path="x"), Row("x:1", {"prompt": text, "completion": "c"}))


def test_prompts_are_compared_as_they_are_read() -> None:
    assert key("How many?  Say it") == key(" how many? say\nIT")
    assert key("How many? Say it") != key("How much? Say it")
    assert key("48/2=") != key("48*2=")


def test_a_conversation_is_what_comes_before_the_last_answer() -> None:
    source = SourceConfig(path="x", format="messages", chat_template="chatml")

    def turns(*said: str) -> bytes:
        roles = ["user", "assistant"] * 2
        rows = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
        return key_of(source, Row("x:1", {"messages": rows}))

    assert turns("a", "b") == turns("A", "c")
    assert turns("a", "b", "c", "d") != turns("a", "x", "c", "d")


@pytest.fixture
def prepared(tmp_path: Path) -> Any:
    model = ModelConfig(path=str(save_tiny_llama(tmp_path / "model")))

    def prepare(**sources: list[str]) -> tuple[DataConfig, PreparedData]:
        written: dict[str, Any] = {"validation": 0.5}
        for name, prompts in sources.items():
            rows = [{"prompt": text, "completion": f"{n}"} for n, text in enumerate(prompts)]
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            written[name] = {"path": str(path)}
        data = DataConfig.model_validate(written)
        return data, prepare_data(data, load_tokenizer(model), 0, tmp_path / "cache")

    return prepare


def test_overlaps_are_counted_and_refused_above_a_threshold(prepared: Any) -> None:
    data, found = prepared(
        train=["one", "two", "three", "four"],
        validation=["five", "six"],
        test=["ONE", "seven", " tWo ", "six", "eight"],
    )
    assert found.report.overlaps == {
        "train/validation": 0,
        "train/test": 2,
        "validation/test": 1,
    }
    assert found.report.duplicates["train/test"] == 0  # which has other answers
    check_overlap(data, found.report, 0.4)
    with pytest.raises(DataError, match=r"data\.test shares 2 of its 5 prompts with data\.train"):
        check_overlap(data, found.report, 0.3)
    # A second time the counts come from the cache.
    _, again = prepared(
        train=["one", "two", "three", "four"],
        validation=["five", "six"],
        test=["ONE", "seven", " tWo ", "six", "eight"],
    )
    assert again.report.overlaps == found.report.overlaps


def test_choosing_on_the_test_set_is_refused(prepared: Any) -> None:
    data, found = prepared(train=["one", "two"], validation=["a", "b"], test=["a", "b", "c"])
    with pytest.raises(DataError, match="selecting on the test set is refused"):
        check_overlap(data, found.report, 0.5)


def test_a_drawn_validation_split_is_as_repetitive_as_train(prepared: Any) -> None:
    data, found = prepared(train=["same"] * 8)
    assert found.report.overlaps == {"train/validation": 4}
    check_overlap(data, found.report, 0.0)
