from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raytune_ft.config.data import DataConfig
from raytune_ft.data.formats import Encoder
from raytune_ft.data.order import draw_validation
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import PreparedData, open_prepared
from raytune_ft.data.report import DataReport
from raytune_ft.errors import DataError, RunFailed, StorageError
from tests.support.rows import fingerprints


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    rows = [{"prompt": f"count {i}", "completion": f"{i}"} for i in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_config(train: Path, **keys: Any) -> DataConfig:
    for split in ("validation", "test"):
        if isinstance(keys.get(split), Path):
            keys[split] = {"path": str(keys[split])}
    return DataConfig.model_validate({"train": {"path": str(train)}, **keys})


@pytest.fixture
def prepare(tiny: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., PreparedData]:
    def run(data: DataConfig, seed: int = 0) -> PreparedData:
        return prepare_data(data, tiny, seed, tmp_path / "cache")

    return run


Prepare = Callable[..., PreparedData]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is tokenised while the test runs."""
    texts: list[str] = []
    original = Encoder.encode

    def encode(self: Encoder, batch: list[str], spelled: str = "text") -> list[list[int]]:
        texts.extend(batch)
        return original(self, batch, spelled)

    monkeypatch.setattr(Encoder, "encode", encode)
    return texts


def prints(prepared: PreparedData) -> dict[str, set[bytes]]:
    splits = {"train": prepared.train, "validation": prepared.validation, "test": prepared.test}
    return {name: set(fingerprints(split)) for name, split in splits.items() if split is not None}


def assert_adds_up(report: DataReport) -> None:
    for source in report.sources.values():
        assert source.rows == source.usable + sum(source.bad.values()) + source.dropped
        assert source.truncated <= source.usable
        assert source.bad.keys() == source.first_bad.keys()


# splits


def test_splits_are_disjoint_and_hold_every_example_once(prepare: Prepare, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", 100)
    test = write_rows(tmp_path / "test.jsonl", 10, start=100)
    prepared = prepare(data_config(train, validation=0.2, test=test))
    assert (len(prepared.train), len(prepared.validation)) == (80, 20)
    assert prepared.test is not None
    assert len(prepared.test) == 10
    found = prints(prepared)
    assert sum(map(len, found.values())) == 110
    assert not any(a & b for a, b in combinations(found.values(), 2))
    assert set(prepared.report.duplicates.values()) == {0}
    assert prepared.report.duplicates.keys() == {
        "train/validation",
        "train/test",
        "validation/test",
    }


def test_the_draw_depends_on_the_seed_alone(prepare: Prepare, tmp_path: Path) -> None:
    data = data_config(write_rows(tmp_path / "train.jsonl", 100), validation=0.2)
    first = prepare(data, seed=1)
    other = prepare(data, seed=2)
    shutil.rmtree(tmp_path / "cache")
    again = prepare(data, seed=1)
    assert again.validation.sha256 == first.validation.sha256
    assert again.train.sha256 == first.train.sha256
    assert other.validation.sha256 != first.validation.sha256
    assert other.path != first.path


@pytest.mark.parametrize("count", [2, 3, 7, 100])
@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.5, 0.999])
def test_neither_side_of_the_draw_is_empty(count: int, fraction: float) -> None:
    is_held = draw_validation(count, fraction, seed=0)
    train, validation = np.flatnonzero(~is_held), np.flatnonzero(is_held)
    assert sorted([*train, *validation]) == list(range(count))
    assert list(train) == sorted(train)
    assert len(train) >= 1
    assert len(validation) >= 1
    assert abs(len(validation) - count * fraction) <= 1


def test_one_example_cannot_be_divided(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.validation=0\.05 cannot be drawn from 1 usable"):
        prepare(data_config(write_rows(tmp_path / "train.jsonl", 1)))


def test_identical_examples_across_splits_are_counted_for_each_pair(
    prepare: Prepare, tmp_path: Path
) -> None:
    train = write_rows(tmp_path / "train.jsonl", 10)
    validation = write_rows(tmp_path / "validation.jsonl", 5, start=8)
    with validation.open("a") as file:  # Twice in validation: both of them count.
        file.write(json.dumps({"prompt": "count 8", "completion": "8"}) + "\n")
    test = write_rows(tmp_path / "test.jsonl", 6, start=9)
    prepared = prepare(data_config(train, validation=validation, test=test))
    assert prepared.report.duplicates == {
        "train/validation": 3,
        "train/test": 1,
        "validation/test": 4,
    }


# rows


def test_every_row_is_accounted_for(prepare: Prepare, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", 20)
    long = "a b c d " * 40
    with path.open("ab") as file:
        file.write(b'{"prompt": "\xff", "completion": "x"}\n')
        file.write(b'{"prompt": "x", "completion": 3}\n')
        file.write(b'{"prompt": "x", "completion": ""}\n{"prompt": "", "completion": "x"}\n')
        file.write(json.dumps({"prompt": "x", "completion": long}).encode() + b"\n")
        file.write(json.dumps({"prompt": long, "completion": "x"}).encode() + b"\n")
    prepared = prepare(data_config(path, max_length=32, max_bad_fraction=0.5))
    source = prepared.report.sources["train"]
    assert (source.rows, source.usable, source.truncated, source.dropped) == (26, 21, 1, 0)
    assert source.bad == {"bad_encoding": 1, "empty": 2, "no_label_token": 1, "wrong_type": 1}
    assert source.first_bad["empty"].startswith("train.jsonl:23: 'completion'")
    assert source.first_bad["no_label_token"].startswith("train.jsonl:26: ")
    assert source.longest > 32
    assert max(prepared.train.lengths.max(), prepared.validation.lengths.max()) == 32
    assert_adds_up(prepared.report)


@pytest.mark.parametrize("allowed", [0.0, 0.05, 0.0999])
def test_too_many_bad_rows_are_refused_with_causes_and_the_first(
    prepare: Prepare, tmp_path: Path, allowed: float
) -> None:
    path = write_rows(tmp_path / "train.jsonl", 18)
    with path.open("a") as file:
        file.write('{"prompt": "x", "completion": 3}\n{"prompt": "x", "completion": ""}\n')
    expected = (
        r"data\.train\.path=train\.jsonl has 2 unusable rows of 20 \(wrong_type 1, empty 1; "
        r"the first is train\.jsonl:19: .*raise data\.max_bad_fraction"
    )
    with pytest.raises(DataError, match=expected):
        prepare(data_config(path, max_bad_fraction=allowed))
    assert prepare(data_config(path, max_bad_fraction=0.1)).report.sources["train"].usable == 18


def long_rows(path: Path) -> Path:
    """19 short rows, and on line 5 one with a long completion."""
    lines = write_rows(path, 19).read_text().splitlines()
    lines.insert(4, json.dumps({"prompt": "x", "completion": "a b c d " * 40}))
    path.write_text("\n".join(lines))
    return path


def test_over_long_rows_do_not_count_as_bad(prepare: Prepare, tmp_path: Path) -> None:
    path = long_rows(tmp_path / "train.jsonl")
    limits: dict[str, Any] = {"max_length": 32, "max_bad_fraction": 0.0}
    cut = prepare(data_config(path, **limits)).report
    dropped = prepare(data_config(path, too_long="drop", **limits)).report
    source = cut.sources["train"]
    assert (source.usable, source.truncated, source.dropped, source.bad) == (20, 1, 0, {})
    source = dropped.sources["train"]
    assert (source.usable, source.truncated, source.dropped, source.bad) == (19, 0, 1, {})
    assert_adds_up(cut)
    assert_adds_up(dropped)
    with pytest.raises(DataError, match=r"data\.train: train\.jsonl:5 has \d+ tokens, over"):
        prepare(data_config(path, too_long="error", **limits))


def test_truncation_cuts_the_end_of_the_row(
    prepare: Prepare, tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = long_rows(tmp_path / "train.jsonl")
    other = write_rows(tmp_path / "validation.jsonl", 2)
    cut = prepare(data_config(path, validation=other, max_length=32))
    whole = prepare(data_config(path, validation=other, max_length=1000))
    ids, mask = cut.train.example(4)
    whole_ids, whole_mask = whole.train.example(4)
    assert len(ids) == 32
    assert len(whole_ids) > 32
    np.testing.assert_array_equal(ids, whole_ids[:32])
    np.testing.assert_array_equal(mask, whole_mask[:32])


def test_no_usable_row_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", 3)
    with pytest.raises(DataError, match=r"row of 3 \(0 bad, 3 too long\); write data.max_length="):
        prepare(data_config(path, max_length=2, too_long="drop"))
    with pytest.raises(DataError, match=r"row of 3 \(3 bad, 0 too long\); write data.max_length="):
        prepare(data_config(path, max_length=2, max_bad_fraction=1.0))
    path.write_text('{"prompt": "x", "completion": 3}\n')
    with pytest.raises(DataError, match=r"row of 1 \(1 bad, 0 too long\); mend the rows$"):
        prepare(data_config(path, max_bad_fraction=1.0))


@pytest.mark.parametrize("others", ["", '{"prompt": "x", "completion": 3}\n'])
def test_rows_whose_prompt_fills_the_length_are_kept_by_the_length_that_is_named(
    prepare: Prepare, tmp_path: Path, others: str
) -> None:
    path = write_rows(tmp_path / "train.jsonl", 20)
    with path.open("a") as file:
        for repeats in (60, 40):
            file.write(json.dumps({"prompt": "a b c d " * repeats, "completion": "x y"}) + "\n")
        file.write(others)
    with pytest.raises(DataError, match="no_label_token 2") as refused:
        prepare(data_config(path, max_length=32))
    line = str(refused.value)
    assert ("mend the others" in line) == bool(others)
    assert "or raise data.max_bad_fraction" in line
    named = int(re.search(r"write data\.max_length=(\d+)", line)[1])  # type: ignore[index]
    kept = prepare(data_config(path, max_length=named, max_bad_fraction=0.1)).report
    assert (kept.sources["train"].usable, kept.sources["train"].truncated) == (22, 0)
    assert kept.sources["train"].longest == named


def test_no_length_is_named_for_a_row_without_any_label(
    prepare: Prepare, tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A line that is a single token, which nothing precedes."""
    path = tmp_path / "corpus.txt"
    path.write_text("a\nb\n")
    tiny.eos_token = None
    tiny.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    data = DataConfig.model_validate({"train": {"path": str(path), "format": "text"}})
    with pytest.raises(DataError, match=r"no_label_token 2; .*; mend them or raise"):
        prepare(data)


def test_a_missing_test_file_is_found_before_anything_is_tokenised(
    prepare: Prepare, tmp_path: Path, encoded: list[str]
) -> None:
    path = write_rows(tmp_path / "train.jsonl", 3)
    with pytest.raises(DataError, match=r"data\.test\.path=.* does not exist"):
        prepare(data_config(path, test=tmp_path / "gone.jsonl"))
    assert not encoded


def test_a_tokenizer_without_eos_is_noted(
    prepare: Prepare, tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = data_config(write_rows(tmp_path / "train.jsonl", 10))
    assert prepare(data).report.notes == ()
    tiny.eos_token = None
    assert "no EOS" in prepare(data).report.notes[0]


def test_progress_names_every_source_and_its_counts(
    tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    train = write_rows(tmp_path / "train.jsonl", 1200)
    test = write_rows(tmp_path / "test.jsonl", 3)
    lines: list[str] = []
    for _ in range(2):
        prepare_data(data_config(train, test=test), tiny, 0, tmp_path / "cache", lines.append)
    assert lines[0].startswith("data.train: 1,200 of 1,200 rows usable")
    assert lines[1].startswith("data.test: 3 of 3 rows usable")
    assert "tokens of an earlier run" in lines[2]
    assert len(lines) == 3


# the cache


def test_the_report_survives_json(prepare: Prepare, tmp_path: Path) -> None:
    report = prepare(data_config(long_rows(tmp_path / "train.jsonl"), max_length=32)).report
    assert DataReport.from_json(report.to_json()) == report
    assert asdict(report)["splits"]["train"]["examples"] == 19


def test_a_worker_opens_the_same(prepare: Prepare, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", 30)
    prepared = prepare(data_config(path, test=path))
    opened = open_prepared(prepared.path)
    assert opened.report == prepared.report
    assert opened.train.sha256 == prepared.report.splits["train"].sha256
    assert opened.validation.sha256 == prepared.report.splits["validation"].sha256
    assert opened.test is not None
    assert opened.test.sha256 == prepared.report.splits["test"].sha256
    assert not list(prepared.path.parent.glob(".*"))


def test_a_second_call_tokenises_nothing(
    prepare: Prepare, tmp_path: Path, encoded: list[str], tiny_path: str
) -> None:
    data = data_config(write_rows(tmp_path / "train.jsonl", 30), packing=True)
    first = prepare(data)
    written = (first.path / "train.arrow").stat().st_mtime_ns
    assert encoded
    encoded.clear()
    second = prepare(data.model_copy(update={"packing": False}))
    other_object = AutoTokenizer.from_pretrained(tiny_path)
    third = prepare_data(data, other_object, 0, tmp_path / "cache")
    assert not encoded
    assert first.path == second.path == third.path
    assert (second.path / "train.arrow").stat().st_mtime_ns == written


def test_moved_data_and_a_moved_tokenizer_are_the_same(
    prepare: Prepare, tmp_path: Path, encoded: list[str], tiny: PreTrainedTokenizerBase
) -> None:
    path = write_rows(tmp_path / "train.jsonl", 30)
    first = prepare(data_config(path))
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "train.jsonl")
    tiny.save_pretrained(tmp_path / "tokenizer")
    encoded.clear()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    second = prepare_data(data_config(moved), tokenizer, 0, tmp_path / "cache")
    assert second.path == first.path
    assert not encoded


def test_whatever_changes_the_tokens_changes_the_key(
    prepare: Prepare, tmp_path: Path, tiny: PreTrainedTokenizerBase
) -> None:
    path = write_rows(tmp_path / "train.jsonl", 30)
    other = write_rows(tmp_path / "other.jsonl", 3)
    paths = [
        prepare(data).path
        for data in (
            data_config(path),
            data_config(path, validation=0.5),
            data_config(path, validation=other),
            data_config(path, test=other),
            data_config(path, max_length=100),
            data_config(path, separator=" "),
            data_config(path, too_long="drop"),
            data_config(path, max_bad_fraction=0.5),
            DataConfig.model_validate({"train": {"path": str(path), "prompt": "completion"}}),
            DataConfig.model_validate(
                {"train": {"path": str(path), "format": "text", "text": "prompt"}}
            ),
        )
    ]
    paths.append(prepare(data_config(path), seed=1).path)
    tiny.chat_template = "{{ messages[0].content }}"
    paths.append(prepare(data_config(path)).path)
    tiny.add_tokens(["count"])
    paths.append(prepare(data_config(path)).path)
    path.write_text(path.read_text().replace("count 3", "count 4", 1))
    paths.append(prepare(data_config(path)).path)
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize(
    "damage",
    ["cut", "flipped", "no report", "half a report", "wrong report", "no split", "rows", "empty"],
)
def test_a_damaged_cache_is_rebuilt(prepare: Prepare, tmp_path: Path, damage: str) -> None:
    data = data_config(write_rows(tmp_path / "train.jsonl", 200))
    first = prepare(data)
    path, expected = first.path, first.report
    arrow, report = path / "train.arrow", path / "report.json"
    content = bytearray(arrow.read_bytes())
    tokens = first.train.input_ids[:50].tobytes()
    del first
    # A new file each time, because the old one may still be mapped.
    arrow.unlink()
    if damage == "cut":
        arrow.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[content.index(tokens)] ^= 1
        arrow.write_bytes(content)
    else:
        arrow.write_bytes(content)
    if damage == "no report":
        report.unlink()
    elif damage == "half a report":
        report.write_text(report.read_text()[:200])
    elif damage == "wrong report":
        report.write_text("[]")
    elif damage == "no split":
        arrow.unlink()
    elif damage == "rows":
        rows = np.load(path / "train_rows.npy")
        (path / "train_rows.npy").unlink()
        np.save(path / "train_rows.npy", rows[::-1])
    elif damage == "empty":
        shutil.rmtree(path)
        path.mkdir()
    if damage not in ("flipped", "rows"):
        with pytest.raises(RunFailed):
            open_prepared(path)
    rebuilt = prepare(data)
    assert rebuilt.path == path
    assert rebuilt.report == expected
    assert rebuilt.train.sha256 == expected.splits["train"].sha256
    assert open_prepared(path).train.sha256 == rebuilt.train.sha256
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_is_refused(
    tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    data = data_config(write_rows(tmp_path / "train.jsonl", 10))
    with pytest.raises(StorageError, match="cannot hold tokens"):
        prepare_data(data, tiny, 0, tmp_path / "file" / "cache")


PROCESS = """
import pickle, sys, time
from pathlib import Path
from raytune_ft.config.data import DataConfig
from raytune_ft.data.prepare import prepare_data

tokenizer = pickle.loads(Path(sys.argv[1]).read_bytes())
start, train, cache = Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
start.with_suffix("." + sys.argv[5]).touch()
while not start.exists():
    time.sleep(0.001)
for seed in range(5):
    prepared = prepare_data(
        DataConfig.model_validate({"train": {"path": train}}), tokenizer, seed, cache
    )
    print(prepared.path, prepared.train.sha256)
"""


def test_two_processes_may_prepare_the_same_at_once(
    tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    train = write_rows(tmp_path / "train.jsonl", 300)
    tokenizer = tmp_path / "tokenizer.pickle"  # to load it by transformers would import torch
    tokenizer.write_bytes(pickle.dumps(tiny))
    start, cache = tmp_path / "start", tmp_path / "cache"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, tokenizer, start, train, cache, str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("start.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    start.touch()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == 5
    assert len(list(cache.iterdir())) == 5


# real data


def test_gsm8k_on_stories260k(
    stories: PreTrainedTokenizerBase, shared_dir: Path, tmp_path: Path
) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    folder = shared_dir / "data" / "gsm8k"
    data = DataConfig.model_validate(
        {
            "train": {"path": str(folder / "train.jsonl"), **columns},
            "test": {"path": str(folder / "test.jsonl"), **columns},
        }
    )
    prepared = prepare_data(data, stories, 0, tmp_path)
    train, test = prepared.report.sources["train"], prepared.report.sources["test"]
    assert (train.rows, test.rows, test.bad) == (7473, 1319, {})
    assert train.bad == {"no_label_token": 1}
    assert (len(prepared.train), len(prepared.validation)) == (7098, 374)
    assert set(prepared.report.duplicates.values()) == {0}
    assert_adds_up(prepared.report)
    assert (prepared.train.label_counts > 0).all()
    assert prepared.train.lengths.max() == 512


def test_the_sms_file_keeps_every_row(
    stories: PreTrainedTokenizerBase, shared_dir: Path, tmp_path: Path
) -> None:
    source = {
        "path": str(shared_dir / "data" / "sms_spam" / "sms.tsv"),
        "columns": ["label", "text"],
        "prompt": "text",
        "completion": "label",
    }
    data = DataConfig.model_validate({"train": source, "max_bad_fraction": 0.0})
    prepared = prepare_data(data, stories, 0, tmp_path)
    assert prepared.report.sources["train"].usable == 5574
    # The file repeats messages, so that a random draw shares some with train.
    assert prepared.report.duplicates["train/validation"] > 0
    ids, mask = prepared.train.example(0)
    assert stories.decode(ids[mask].tolist()) == "ham</s>"


def test_a_report_says_what_was_not_read_lost_or_changed(
    prepare: Prepare, tmp_path: Path, tiny: PreTrainedTokenizerBase
) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{{ '!' if loop.last and m.role == 'assistant' }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (tmp_path / "own.jinja").write_text(template)
    turns = [
        {"role": role, "content": f"{role} {number}"}
        for number in range(2)
        for role in ("user", "assistant")
    ]
    rows: list[dict[str, Any]] = [{"messages": turns, "id": number} for number in range(8)]
    rows[1]["images"] = ["a.png"]
    rows[2]["images"] = []
    rows[3]["messages"] = [*turns[:3], turns[3] | {"reasoning_content": "hm"}]
    rows[4]["messages"] = [turns[0] | {"content": "</s>"}, *turns[1:]]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(file), "format": "auto", "chat_template": str(tmp_path / "own.jinja")}
    plain = {"train": source, "validation": source, "max_bad_fraction": 0.2}
    report = prepare(DataConfig.model_validate(plain)).report.sources["train"]
    assert report.format == "messages"
    assert report.unread == {"id": 8, "images": 1}
    assert report.lost == {"reasoning": 1}
    assert report.first_lost == {"reasoning": "chats.jsonl:4"}
    assert report.notes == {"own_example": 8, "special_text": 1}
    assert report.ends == {"</s>": 16}
    with pytest.raises(DataError, match=r"leaves something out .reasoning 1; .*chats\.jsonl:4"):
        prepare(DataConfig.model_validate(plain | {"max_bad_fraction": 0.1}))
    # What lies behind the limit is not learnt, and the rest of the row is.
    width = len(tiny("<|user|>user 0</s><|assistant|>assistant 0!</s>")["input_ids"])
    short = prepare(DataConfig.model_validate(plain | {"max_length": width + 2}))
    assert short.report.sources["train"].notes["turns_too_far"] == 8
    assert len(short.train) == 8


def test_tool_calls_give_the_same_tokens_from_every_kind_of_file(
    prepare: Prepare, tmp_path: Path
) -> None:
    """Parquet gives every struct the keys of all, and null where a row has none."""

    def row(number: int) -> dict[str, Any]:
        arguments = {"city": "Oslo"} if number % 2 else {"zone": "utc", "digits": number}
        call = {"type": "function", "function": {"name": "clock", "arguments": arguments}}
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": f"time {number}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "noon", "name": "clock"},
            {"role": "assistant", "content": "It is noon."},
        ]
        tools = [{"type": "function", "function": {"name": "clock", "parameters": arguments}}]
        return {"messages": turns} | ({"tools": tools} if number < 2 else {})

    rows = [row(number) for number in range(12)]
    template = (
        "{{ tools | tojson if tools else '' }}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
        "{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (tmp_path / "own.jinja").write_text(template)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    filled = [{"tools": None, **one} for one in rows]
    table = datasets.Dataset.from_list(filled)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    text = [{name: json.dumps(value) for name, value in one.items()} for one in rows]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(one) + "\n" for one in text))
    found = set()
    for name in ("a.jsonl", "a.parquet", "saved", "text.jsonl"):
        source = {"path": str(tmp_path / name), "format": "messages"}
        source["chat_template"] = str(tmp_path / "own.jinja")
        prepared = prepare(DataConfig.model_validate({"train": source, "validation": source}))
        assert prepared.report.sources["train"].usable == 12
        found.add(prepared.train.sha256)
    assert len(found) == 1
