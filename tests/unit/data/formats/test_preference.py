"""Pairs of answers as files write them."""

from __future__ import annotations

import json
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from raytune_ft.config.data import DataConfig
from raytune_ft.config.schema import ModelConfig
from raytune_ft.data.arrays import empty_on_disk
from raytune_ft.data.formats.unpaired import write_partners
from raytune_ft.data.order import permutation
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import DataError
from raytune_ft.model.load import load_tokenizer

ASKED = [{"role": "user", "content": "2 + 2?"}]
FOUR, FIVE = ({"role": "assistant", "content": text} for text in ("four", "it is five"))
TURNS = {"prompt": ASKED, "chosen": [FOUR], "rejected": [FIVE]}
FORMS: dict[str, dict[str, Any]] = {
    "turns behind a prompt": TURNS,
    "an answer as a turn": {"prompt": ASKED, "chosen": FOUR, "rejected": FIVE},
    "answers as texts": {"prompt": ASKED, "chosen": "four", "rejected": "it is five"},
    "whole conversations": {"chosen": [*ASKED, FOUR], "rejected": [*ASKED, FIVE]},
    "whole conversations beside a text": {
        "prompt": "2 + 2?",
        "chosen": [*ASKED, FOUR],
        "rejected": [*ASKED, FIVE],
    },
    "a text before turns": {"prompt": "2 + 2?", "chosen": [FOUR], "rejected": [FIVE]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2 + 2?"}],
        "chosen": {"from": "gpt", "value": "four"},
        "rejected": {"from": "gpt", "value": "it is five"},
    },
    "alpaca": {"instruction": "2 + 2?", "input": "", "chosen": "four", "rejected": "it is five"},
    "JSON as text": {name: json.dumps(value) for name, value in TURNS.items()},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelConfig(path="builtin:tiny"))


def prepared(
    tokenizer: PreTrainedTokenizerBase, root: Path, rows: list[dict[str, Any]], **changes: Any
) -> PreparedData:
    path = root / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path), "format": "preference", **changes.pop("source", {})}
    data = {"train": source, "validation": 0.5, "max_length": 64, "max_bad_fraction": 0.9}
    config = DataConfig.model_validate({**data, **changes})
    return prepare_data(config, tokenizer, 0, root / "cache")


def answers(tokenizer: PreTrainedTokenizerBase, split: TokenizedSplit, i: int) -> list[str]:
    """What carries loss in each sequence of an example, after the whole text of the first."""
    found = []
    for ids, mask in map(split.sequence, range(2 * i, 2 * len(split))):
        assert not mask[0]
        found.append(tokenizer.decode(ids[mask].tolist()))
    return found[:2]


@pytest.mark.parametrize("form", FORMS)
def test_every_way_of_files(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, form: str) -> None:
    others = [{"prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(3)]
    data = prepared(tokenizer, tmp_path, [FORMS[form], *others])
    reference = prepared(tokenizer, tmp_path, [TURNS, *others])
    assert data.train.sha256 == reference.train.sha256
    assert data.validation.sha256 == reference.validation.sha256
    splits = [data.train, data.validation]
    said = [answers(tokenizer, split, i) for split in splits for i in range(len(split))]
    (ours,) = [pair for pair in said if "four" in pair[0]]
    assert "five" in ours[1]
    assert "2 + 2" not in ours[0]


def test_texts_end_with_eos_and_share_a_prompt(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": f"p{n}", "chosen": "good", "rejected": "worse"} for n in range(4)]
    split = prepared(tokenizer, tmp_path, rows).train
    assert split.parts == 2
    assert answers(tokenizer, split, 0) == [
        f"good{tokenizer.eos_token}",
        f"worse{tokenizer.eos_token}",
    ]
    assert split.part_lengths([0]) == np.diff(split.part_offsets[:3]).tolist()
    assert split.lengths.tolist() == [sum(split.part_lengths([i])) for i in range(len(split))]
    assert np.diff(split.part_labels).sum() == split.label_mask.sum() == split.label_counts.sum()


def test_answers_that_are_json_are_texts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n}", "chosen": '{"a": 1}', "rejected": "[1, 2]"} for n in range(4)]
    split = prepared(tokenizer, tmp_path, rows).train
    eos = tokenizer.eos_token
    assert answers(tokenizer, split, 0) == [f'{{"a": 1}}{eos}', f"[1, 2]{eos}"]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "same_answers"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "empty"),
        ({"prompt": "p", "chosen": None, "rejected": "a"}, "empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "empty"),
        ({"prompt": "p", "chosen": 3, "rejected": "a"}, "wrong_type"),
        ({"prompt": ASKED, "chosen": [FOUR], "rejected": 3}, "wrong_type"),
        ({"chosen": ASKED, "rejected": [*ASKED, FIVE]}, "empty"),
        ({"prompt": ASKED, "chosen": ASKED, "rejected": [FIVE]}, "prompts_differ"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "by": "much"}, "bad_margin"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "by": 10**400}, "bad_margin"),
    ],
)
def test_bad_pairs(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], cause: str
) -> None:
    good = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "by": 1} for n in range(4)]
    source = {"margin": "by"} if "by" in row else {}
    report = prepared(tokenizer, tmp_path, [row, *good], source=source).report
    assert report.sources["train"].bad == {cause: 1}


def test_too_long_pairs(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A limit is one of a sequence, not of both."""
    long = {"prompt": "p", "chosen": "a", "rejected": "b" * 200}
    rows = [{"prompt": f"p{n}", "chosen": "a" * 20, "rejected": "b" * 20} for n in range(4)]
    dropped = prepared(tokenizer, tmp_path, [*rows, long], too_long="drop", max_length=32)
    assert dropped.report.sources["train"].dropped == 1
    assert max(dropped.train.lengths) == 40
    cut = prepared(tokenizer, tmp_path, [*rows, long], too_long="truncate", max_length=50)
    assert cut.report.sources["train"].truncated == 1
    assert cut.extent[1] == 50
    alike = {"prompt": "p", "chosen": "b" * 100, "rejected": "b" * 101}
    same = prepared(tokenizer, tmp_path, [*rows, alike], too_long="truncate", max_length=50)
    assert same.report.sources["train"].bad == {"same_answers": 1}
    with pytest.raises(DataError, match=r"202|203|over data\.max_length=50"):
        prepared(tokenizer, tmp_path, [*rows, long], too_long="error", max_length=50)


def test_validation_is_drawn_by_prompt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n % 10}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(60)]
    data = prepared(tokenizer, tmp_path, rows, validation=0.3)
    assert data.report.overlaps == {"train/validation": 0}
    assert (len(data.train), len(data.validation)) == (42, 18)
    assert data.report.pairs["train"].prompts == 7


def test_what_the_report_says(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pairs = [("a" * 9, "b"), ("b", "a" * 9), ("c" * 9, "d"), ("e", "f")]
    rows = [{"prompt": "p", "chosen": one, "rejected": other} for one, other in pairs]
    held = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in held))
    other = {"path": str(file), "format": "preference"}
    report = prepared(tokenizer, tmp_path, rows, validation=other).report
    train = report.pairs["train"]
    assert (train.prompts, train.longer_chosen, train.contradictory) == (1, 0.625, 2)
    assert (train.chosen_tokens, train.rejected_tokens) == (6, 4)
    assert "the longer answer is chosen in 62% of pairs" in str(train)
    assert "2 contradict others" in str(train)
    assert report.pairs["validation"].contradictory == 0


def test_a_system_turn_beside_the_prompt(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    row = {"system": "Be brief.", "prompt": "2 + 2?", "chosen": "four", "rejected": "it is five"}
    turns = [{"role": "system", "content": "Be brief."}, *ASKED]
    others = [{"prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(3)]
    one = prepared(tokenizer, tmp_path, [row, *others])
    other = prepared(tokenizer, tmp_path, [{**TURNS, "prompt": turns}, *others])
    assert (one.train.sha256, one.validation.sha256) == (
        other.train.sha256,
        other.validation.sha256,
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": [FOUR], "rejected": [*ASKED, FIVE]},
        {"chosen": [*ASKED, FOUR], "rejected": [{"role": "user", "content": "3?"}, FIVE]},
        {"prompt": None, "chosen": [FOUR], "rejected": [FIVE]},
    ],
)
def test_answers_to_other_prompts_are_bad(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any]
) -> None:
    good = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(4)]
    (cause,) = prepared(tokenizer, tmp_path, [row, *good]).report.sources["train"].bad
    assert cause in ("prompts_differ", "empty")


def test_sources_that_ask_the_same_share_no_prompt_with_validation(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    files = []
    for name in ("one", "two"):
        rows = [{"prompt": f"p{n}", "chosen": f"a{name}", "rejected": "b"} for n in range(40)]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(file), "format": "preference"} for file in files]
    config = DataConfig.model_validate({"train": sources, "validation": 0.2, "max_length": 64})
    report = prepare_data(config, tokenizer, 0, tmp_path / "cache").report
    assert report.overlaps == {"train/validation": 0}
    alike = [{"prompt": "p", "chosen": f"a{n}", "rejected": "b"} for n in range(9)]
    with pytest.raises(DataError, match="all answers belong to one prompt"):
        prepared(tokenizer, tmp_path, alike)


def test_rated_chats_and_their_prompts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n % 10}?"}],
            "completion": [answer],
            "label": good,
        }
        for n in range(20)
        for answer, good in ((FOUR, True), (FIVE, False))
    ]
    data = prepared(tokenizer, tmp_path, rows, source={"format": "unpaired"}, validation=0.3)
    assert data.report.overlaps == {"train/validation": 0}
    assert data.train.partners is not None
    assert len(data.train.partners) == len(data.train) == 28
    assert data.train.columns["desirable"].mean() == 0.5


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_partners_have_the_answer_of_the_next_in_a_circle(
    tokens: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.data.arrays.BLOCK_TOKENS", tokens)
    rows = [
        {"prompt": "p" * (n % 7), "completion": "c" * (1 + 3 * n % 11), "label": n % 2 == 0}
        for n in range(1, 60)
    ]
    data = prepared(tokenizer, tmp_path, rows, source={"format": "unpaired"}, max_length=12)
    split, partners = data.train, data.train.partners
    assert partners is not None
    circle = permutation(0, 0, len(split), 2**32 - 3)
    cut = 0
    for one, other in zip(circle, np.roll(circle, -1), strict=True):
        (ids, mask), (others, their_mask) = split.example(one), split.example(other)
        joined = [*ids[: mask.argmax()], *others[their_mask.argmax() :]]
        cut += len(joined) > 12
        found, labels = partners.example(one)
        assert found.tolist() == joined[:12]
        assert labels.argmax() == mask.argmax()
        assert labels.sum() == len(found) - mask.argmax()
    assert cut


def test_partners_take_a_few_bytes_of_memory_for_an_example(tmp_path: Path) -> None:
    empty, peaks = partial(empty_on_disk, tmp_path), []
    for length in (200_000, 800_000):
        ids, mask = empty(length * 4, np.int32), empty(length * 4, np.bool_)
        mask.reshape(length, 4)[:, 2:] = True
        split = TokenizedSplit(ids, mask, np.arange(length + 1) * 4)
        tracemalloc.start()
        write_partners(tmp_path / "partners.arrow", split, 0, 8, empty)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 600_000 < 7
