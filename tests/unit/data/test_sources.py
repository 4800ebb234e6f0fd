from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_ft.config.data import SourceConfig
from raytune_ft.config.paths import FILE_KINDS
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.data.sources import TEXT_READERS, open_source
from raytune_ft.errors import DataError
from tests.support.rows import rows_of

COLUMNS = {"prompt": "q", "completion": "a"}
PAIRS = [
    {"q": "one, two", "a": 'say "x"'},
    {"q": "tab\there", "a": "é\nline"},
    {"q": "3", "a": "y"},
]


def read(path: Path | str, wanted: dict[str, str] = COLUMNS, **keys: Any) -> list[Row | BadRow]:
    source = SourceConfig(path=str(path), **keys)
    return list(rows_of(open_source("data.train", source), wanted, Path("unused")))


def pairs(rows: list[Row | BadRow]) -> list[dict[str, Any]]:
    assert all(isinstance(row, Row) for row in rows), rows
    return [{key: row.values[key] for key in COLUMNS.values()} for row in rows]


def causes(rows: list[Row | BadRow]) -> dict[str, str]:
    return {row.origin: row.cause for row in rows if isinstance(row, BadRow)}


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))


def write_json(path: Path) -> None:
    path.write_text(json.dumps(PAIRS))


def write_json_data(path: Path) -> None:
    path.write_text(json.dumps({"version": 1, "data": PAIRS}))


def write_csv(path: Path) -> None:
    path.write_text('q,a\n"one, two","say ""x"""\ntab\there,"é\nline"\n3,y\n')


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([pair | {"extra": 1} for pair in PAIRS]), path)


def write_folder(path: Path) -> None:
    datasets.Dataset.from_list(PAIRS).save_to_disk(str(path))


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": write_jsonl,
    "a.json": write_json,
    "data.json": write_json_data,
    "a.csv": write_csv,
    "a.parquet": write_parquet,
    "folder": write_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_rows_with_an_origin(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    rows = read(tmp_path / name)
    assert pairs(rows) == PAIRS
    assert len({row.origin for row in rows}) == len(rows)
    assert all(row.origin.startswith(f"{name}:") for row in rows)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "data.json"])
def test_every_kind_names_the_column_that_no_row_has(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    with pytest.raises(DataError, match=r"data\.train\.prompt=question is not a column .* q, a"):
        read(tmp_path / name, {"prompt": "question", "completion": "a"})


def test_a_column_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    with pytest.raises(DataError, match=r"did you mean data\.train\.prompt=question\?"):
        read(tmp_path / "a.jsonl", {"prompt": "questoin", "completion": "answer"})


def test_bad_lines_of_jsonl_are_named_with_their_cause(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"q": "mark at the start", "a": "b"}',
        b'{"q": "\xff", "a": "b"}',
        b'{"q": "cut',
        b'["a", "list"]',
        b'{"q": "no answer"}',
        b"",
        b"[" * 100_000,
        '{"q": "\u2028 is no line end", "a": "b"}'.encode() + b"\r",
        b"",
        b"",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = read(tmp_path / "a.jsonl")
    assert causes(rows) == {
        "a.jsonl:2": "bad_encoding",
        "a.jsonl:3": "bad_json",
        "a.jsonl:4": "wrong_type",
        "a.jsonl:5": "missing_column",
        "a.jsonl:6": "empty",
        "a.jsonl:7": "bad_json",
    }
    good = [row for row in rows if isinstance(row, Row)]
    assert [row.origin for row in good] == ["a.jsonl:1", "a.jsonl:8"]
    assert good[1].values["q"] == "\u2028 is no line end"


def test_bad_records_of_csv_are_named_with_their_first_line(tmp_path: Path) -> None:
    content = b'q,a\n"two\nlines",b\none field\n\na,b,c\n\xff,b\n"quote"s,b\nlast,row\n\n'
    (tmp_path / "a.csv").write_bytes(content)
    rows = read(tmp_path / "a.csv")
    assert causes(rows) == {
        "a.csv:4": "wrong_columns",
        "a.csv:5": "empty",
        "a.csv:6": "wrong_columns",
        "a.csv:7": "bad_encoding",
        "a.csv:8": "bad_csv",
    }
    assert [row.origin for row in rows if isinstance(row, Row)] == ["a.csv:2", "a.csv:9"]


def test_a_csv_quote_that_never_closes_is_refused_and_swallows_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('q,a\n"open,b\nc,d\ne,f\n')
    with pytest.raises(DataError, match=r"a\.csv:2 is not CSV"):
        read(tmp_path / "a.csv")


def test_quotes_in_tsv_are_literal(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b'q\ta\r\n"open\tb\r\n\xff\tx\r\none\r\nx\t"y"\n')
    rows = read(tmp_path / "a.tsv")
    assert causes(rows) == {"a.tsv:3": "bad_encoding", "a.tsv:4": "wrong_columns"}
    values = [row.values for row in rows if isinstance(row, Row)]
    assert values == [{"q": '"open', "a": "b"}, {"q": "x", "a": '"y"'}]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_named_columns_make_the_first_line_a_row(tmp_path: Path, kind: str) -> None:
    separator = "," if kind == "csv" else "\t"
    path = tmp_path / f"a.{kind}"
    path.write_text(f"1{separator}2\n3{separator}4\n")
    assert pairs(read(path, columns=["q", "a"])) == [{"q": "1", "a": "2"}, {"q": "3", "a": "4"}]
    with pytest.raises(DataError, match="without a header line"):
        read(path)


def test_a_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,q,a\n1,2,3\n")
    with pytest.raises(DataError, match="two columns named 'q'"):
        read(tmp_path / "a.csv")


def test_a_line_of_txt_is_a_row_unless_it_is_blank(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\n  \n  two\r\n\xff\n")
    rows = read(tmp_path / "a.txt", {"text": "text"})
    assert [row.values for row in rows if isinstance(row, Row)] == [
        {"text": "one"},
        {"text": "  two"},
    ]
    assert causes(rows) == {"a.txt:5": "bad_encoding"}
    with pytest.raises(DataError, match="which has text"):
        read(tmp_path / "a.txt", {"text": "body"})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt"])
def test_utf16_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"a.{kind}").write_text('q,a\n{"q": "x", "a": "y"}\n', encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16"):
        read(tmp_path / f"a.{kind}", {"text": "text"})


@pytest.mark.parametrize("content", ["{}", '{"data": 1}', "3", '{"q": 1}\n{"q": 2}', "[" * 100_000])
def test_json_that_is_no_list_of_objects_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json"):
        read(tmp_path / "a.json")


def test_json_keeps_what_is_no_object_as_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"q": "x", "a": "y"}, 3, {"q": "x"}]')
    assert causes(read(tmp_path / "a.json")) == {
        "a.json:row 2": "wrong_type",
        "a.json:row 3": "missing_column",
    }


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.txt", "a.json", "a.parquet"])
def test_no_rows_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(
            pa.table({"q": pa.array([], pa.string()), "a": pa.array([], pa.string())}), path
        )
    else:
        path.write_text({"a.csv": "q,a\n", "a.tsv": "q\ta\n", "a.json": "[]"}.get(name, "\n\n"))
    wanted = {"text": "text"} if name == "a.txt" else COLUMNS
    with pytest.raises(DataError, match="holds no rows"):
        read(path, wanted)


def test_parquet_strings_that_are_no_utf8_stay_rows_for_the_format_to_refuse(
    tmp_path: Path,
) -> None:
    broken = pa.array([b"fine", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"q": broken, "a": ["b", "c"]}), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert isinstance(first, Row)
    assert first.values["q"] == "fine"
    assert isinstance(second, Row)
    assert second.values["q"] == "\udcff"


@pytest.mark.parametrize("keep", [2, 200])
def test_a_parquet_file_that_is_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:keep])
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "a.parquet")


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(PAIRS)
    both = datasets.DatasetDict({"train": data, "test": data.select([0])})
    both.save_to_disk(str(tmp_path / "both"))
    assert len(read(tmp_path / "both", split="train")) == 3
    assert len(read(tmp_path / "both", split="test")) == 1
    with pytest.raises(DataError, match=r"did you mean data\.train\.split=train"):
        read(tmp_path / "both", split="trian")
    with pytest.raises(DataError, match="which has train, test"):
        read(tmp_path / "both")
    datasets.DatasetDict({"only": data}).save_to_disk(str(tmp_path / "one"))
    assert len(read(tmp_path / "one")) == 3
    data.save_to_disk(str(tmp_path / "none"))
    with pytest.raises(DataError, match="without splits"):
        read(tmp_path / "none", split="train")


def test_a_folder_that_is_no_saved_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no rows")
    with pytest.raises(DataError, match="that datasets' save_to_disk did not make"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "keys"),
    [("a.jsonl", {"columns": ["q"]}), ("a.csv", {"split": "train"}), ("folder", {"subset": "x"})],
)
def test_a_key_that_would_be_ignored_is_refused(
    tmp_path: Path, name: str, keys: dict[str, Any]
) -> None:
    WRITERS[name](tmp_path / name)
    with pytest.raises(DataError, match=f"data.train.{next(iter(keys))}=.*remove it"):
        read(tmp_path / name, **keys)


def test_what_does_not_exist_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"does not exist; did you mean .*train\.jsonl"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="does not exist; write a file"):
        read("nothing-here")


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(
        DataError, match=r"unknown kind '\.xlsx'; write one of \.jsonl, .*\.parquet"
    ):
        read(tmp_path / "a.xlsx")


def test_every_kind_of_file_has_a_reader() -> None:
    assert (*TEXT_READERS, ".parquet") == FILE_KINDS


def test_a_hub_data_set_is_read_and_runs_no_remote_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_folder(tmp_path / "folder")
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load(*arguments: Any, **keywords: Any) -> datasets.DatasetDict:
        calls.append((arguments, keywords))
        return datasets.DatasetDict({"train": datasets.load_from_disk(str(tmp_path / "folder"))})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert pairs(read("owner/name-2.5", subset="main", split="train")) == PAIRS
    assert calls == [(("owner/name-2.5", "main"), {})]


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"Couldn't reach .*download the data set elsewhere"):
        read("owner/name")


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    opened = open_source("data.train", SourceConfig(path=str(tmp_path / "a.jsonl")))
    assert opened.sha256 == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()


def test_the_sms_file_is_read_whole(shared_dir: Path) -> None:
    path = shared_dir / "data" / "sms_spam" / "sms.tsv"
    rows = read(path, {"prompt": "text", "completion": "label"}, columns=["label", "text"])
    assert all(isinstance(row, Row) for row in rows)
    assert len(rows) == 5574
    labels = Counter(row.values["label"] for row in rows if isinstance(row, Row))
    assert labels == {"ham": 4827, "spam": 747}
    text = path.read_text(encoding="utf-8")
    quotes = sum(row.values["text"].count('"') for row in rows if isinstance(row, Row))
    assert quotes == text.count('"')
