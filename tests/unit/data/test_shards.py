"""Globs, folders, lists, compressed texts and stores; and what is wrong with each."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from raytune_ft.bucket import Bucket
from raytune_ft.config.data import DataConfig, SourceConfig, name_of_path
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.processes import LocalProcesses
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.data.sources import Source, open_source
from raytune_ft.errors import DataError
from tests.support.rows import rows_of
from tests.support.s3 import Proxy, s3_server

COLUMNS = {"prompt": "prompt", "completion": "completion"}


def row(number: int) -> dict[str, str]:
    return {"prompt": f"ask {number}", "completion": f"say {number}"}


def text(first: int, count: int) -> bytes:
    return b"".join(json.dumps(row(n)).encode() + b"\n" for n in range(first, first + count))


def zstd(raw: bytes) -> bytes:
    return pa.Codec("zstd").compress(raw, asbytes=True) if not raw else _stream(raw)


def _stream(raw: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return bytes(sink.getvalue())


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Rows 0 to 29 in a folder: plain, gzip and zstd of two frames, and files that are none."""
    folder = tmp_path / "shards"
    (folder / "deep").mkdir(parents=True)
    (folder / "a-1.jsonl").write_bytes(text(0, 10))
    (folder / "a-2.jsonl.gz").write_bytes(gzip.compress(text(10, 10)))
    (folder / "deep" / "a-3.jsonl.zst").write_bytes(_stream(text(20, 4)) + _stream(text(24, 6)))
    (folder / "_SUCCESS").write_text("")
    (folder / ".hidden.jsonl").write_text("not JSON")
    (folder / "README.md").write_text("# Shards")
    return folder


def opened(path: Any, piece_bytes: int | None = None, **keys: Any) -> Source:
    return open_source("data.train", SourceConfig(path=path, **keys), piece_bytes)


def rows(path: Any, piece_bytes: int | None = None, **keys: Any) -> list[Row | BadRow]:
    return read(opened(path, piece_bytes, **keys))


def read(source: Source) -> list[Row | BadRow]:
    with tempfile.TemporaryDirectory() as scratch:
        return list(rows_of(source, COLUMNS, Path(scratch)))


def values(found: list[Row | BadRow]) -> list[dict[str, str]]:
    assert all(isinstance(one, Row) for one in found), found
    return [{name: one.values[name] for name in COLUMNS} for one in found]


ALL = [row(number) for number in range(30)]


def test_a_folder_a_glob_and_a_list_are_the_same_rows(shards: Path) -> None:
    first, last = f"{shards}/a-*", f"{shards}/deep/a-3.jsonl.zst"
    for path in (str(shards), f"{shards}/**/a-*", [first, last]):
        found = rows(path)
        assert values(found) == ALL
    assert rows(str(shards))[12].origin == "a-2.jsonl.gz:3"
    assert rows(str(shards))[20].origin == "deep/a-3.jsonl.zst:1"
    listed = opened([last, first])
    assert [one.values for one in read(listed)] == ALL[20:] + ALL[:20]  # as they are listed
    assert listed.name == "a-3.jsonl.zst and 1 more"
    assert opened(str(shards)).sha256 == opened(f"{shards}/**/a-*").sha256 != listed.sha256


@pytest.mark.parametrize(
    ("path", "name"),
    [("x/train-*.jsonl", "train"), ("chats/*.jsonl", "chats"), ("s3://b/chats/*", "chats")],
)
def test_the_name_of_a_glob(path: str, name: str) -> None:
    assert name_of_path(path) == name


def test_every_text_may_be_compressed(tmp_path: Path) -> None:
    plain = {
        "a.json": json.dumps(ALL),
        "a.csv": "prompt,completion\n" + "".join(f'ask {n},"say {n}"\n' for n in range(30)),
        "a.tsv": "prompt\tcompletion\n" + "".join(f"ask {n}\tsay {n}\n" for n in range(30)),
        "a.jsonl": text(0, 30).decode(),
    }
    for name, content in plain.items():
        for end, packed in ((".gz", gzip.compress), (".zst", _stream)):
            (tmp_path / f"{name}{end}").write_bytes(packed(content.encode()))
            assert values(rows(str(tmp_path / f"{name}{end}"))) == ALL


@pytest.mark.parametrize("size", [1, 100, 1000, 10**6])
def test_pieces_join_to_the_same_rows(tmp_path: Path, size: int) -> None:
    raw = b"\xef\xbb\xbf" + text(0, 10) + b"\n \n" + text(10, 20) + b"{\n\xff\n" + b"\n\n\n"
    (tmp_path / "a.jsonl").write_bytes(raw)
    body = "".join(f"ask {n}\tsay {n}\r\n" for n in range(30))
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\r\n" + body, newline="")
    table = pa.Table.from_pylist(ALL)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.tsv", "a.parquet", "saved"):
        path = str(tmp_path / name)
        assert rows(path, size) == rows(path, 10**9)
        assert opened(path, size).sha256 == opened(path).sha256
        if size == 1:
            assert len(opened(path, size).pieces) > 5


def test_a_hub_data_set_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def load(*arguments: Any, **keywords: Any) -> datasets.DatasetDict:
        calls.append(keywords)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ALL)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert values(rows("owner/name", revision="abc123")) == ALL
    assert calls == [{"revision": "abc123"}]


# what is refused


def test_a_glob_without_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train\.path=.*/\*\.jsonl matches no file; write a"):
        opened(f"{tmp_path}/*.jsonl")


def test_a_folder_of_several_kinds(shards: Path) -> None:
    (shards / "b.csv").write_text("prompt,completion\n")
    with pytest.raises(DataError, match=r"several kinds of files \(\.csv, \.jsonl\); write a glob"):
        opened(str(shards))
    with pytest.raises(DataError, match=r"has files of several kinds .* a source for each kind"):
        opened([f"{shards}/a-1.jsonl", f"{shards}/b.csv"])


def test_a_file_that_is_listed_twice(shards: Path) -> None:
    with pytest.raises(DataError, match=r"lists .*a-1\.jsonl twice; list every file once"):
        opened([f"{shards}/a-1.jsonl", f"{shards}/a-*.jsonl"])


def test_shards_with_different_columns(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ALL), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"prompt": "x"}]), tmp_path / "b.parquet")
    (tmp_path / "a.csv").write_text("prompt,completion\nx,y\n")
    (tmp_path / "b.csv").write_text("prompt,answer\nx,y\n")
    (tmp_path / "a.jsonl").write_bytes(text(0, 3))
    (tmp_path / "b.jsonl").write_text('{"prompt": "x", "answer": "y"}\n')
    for kind in ("parquet", "csv", "jsonl"):
        expected = r"different columns: b\.\w+ has no 'completion', which (a\.\w+ has|others have)"
        with pytest.raises(DataError, match=expected):
            rows(f"{tmp_path}/*.{kind}")


@pytest.mark.parametrize("end", ["gz", "zst"])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_truncated_shard(
    tmp_path: Path, tiny: PreTrainedTokenizerBase, end: str, kept: float
) -> None:
    raw = text(0, 5000)
    packed = gzip.compress(raw) if end == "gz" else _stream(raw)
    (tmp_path / "a.jsonl").write_bytes(text(0, 10))
    (tmp_path / f"b.jsonl.{end}").write_bytes(packed[: int(len(packed) * kept)])
    data = DataConfig.model_validate({"train": {"path": f"{tmp_path}/*.jsonl*"}})
    expected = rf"data\.train\.path=.*b\.jsonl\.{end} could not be read to its end .*an intact copy"
    with pytest.raises(DataError, match=expected):
        prepare_data(data, tiny, 0, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_shard_that_changes_while_it_is_read(shards: Path) -> None:
    found = rows_of(opened(f"{shards}/a-*"), COLUMNS, shards)
    next(found)
    with (shards / "a-1.jsonl").open("ab") as file:
        file.write(text(99, 1))
    with pytest.raises(
        DataError, match=r"a-1\.jsonl changed while it was read; let what writes it"
    ):
        list(found)


def test_a_url_that_nothing_reads() -> None:
    with pytest.raises(DataError, match=r"ftp://host/a\.jsonl is a URL that nothing here reads"):
        opened("ftp://host/a.jsonl")
    with pytest.raises(DataError, match=r"gs://bucket/a\.jsonl needs a package .* install gcsfs"):
        opened("gs://bucket/a.jsonl")


# stores


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with s3_server() as address:
        yield address


@pytest.fixture
def store(
    server: tuple[str, int], monkeypatch: pytest.MonkeyPatch, shards: Path
) -> Iterator[Proxy]:
    """The shards below s3://models/data, behind a proxy."""
    proxy = Proxy(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = Bucket("s3://models")
    for file in shards.rglob("*"):
        if file.is_file():
            bucket.upload(file, f"data/{file.relative_to(shards)}")
    yield proxy
    proxy.close()


needs_s3 = pytest.mark.filterwarnings("ignore")


@needs_s3
def test_a_bucket_is_read_as_a_folder_is(store: Proxy) -> None:
    for path in ("s3://models/data/a-*", "s3://models/data/**/a-*"):
        assert values(rows(path)) == (ALL if "**" in path else ALL[:20])
    assert values(rows("s3://models/data/deep/a-3.jsonl.zst")) == ALL[20:]
    several = ["s3://models/data/a-1.jsonl", "s3://models/data/a-2.jsonl.gz"]
    assert values(rows(several)) == ALL[:20]
    assert rows("s3://models/data/**/a-*")[20].origin == "deep/a-3.jsonl.zst:1"


@needs_s3
def test_tokens_of_a_bucket_are_those_of_its_files(
    store: Proxy, shards: Path, tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """In processes of their own, through connections that break."""
    store.every = 5
    found = []
    for number, path in enumerate((f"{shards}/**/a-*", "s3://models/data/**/a-*")):
        data = DataConfig.model_validate({"train": {"path": path}})
        workers = LocalProcesses(2)
        cache = tmp_path / str(number)
        prepared = prepare_data(data, tiny, 0, cache, workers=workers, piece_bytes=300)
        found.append((prepared.report.splits, prepared.train.sha256))
        assert len(list(cache.iterdir())) == 1  # no copy of a shard is left
    assert found[0] == found[1]
    assert store.done


@needs_s3
def test_a_bucket_without_permission(store: Proxy) -> None:
    store.closed = True
    expected = r"data\.train\.path=s3://models refuses \(AccessDenied\); write a bucket that these"
    with pytest.raises(DataError, match=expected) as refused:
        opened("s3://models/data/*.jsonl")
    assert "swordfish" not in str(refused.value)


@needs_s3
def test_a_bucket_without_files(store: Proxy) -> None:
    with pytest.raises(DataError, match=r"s3://models/data/\*\.csv matches no file"):
        opened("s3://models/data/*.csv")
    with pytest.raises(DataError, match=r"s3://models/gone\.jsonl does not exist"):
        opened("s3://models/gone.jsonl")


@needs_s3
def test_an_object_that_changes_while_it_is_read(store: Proxy) -> None:
    source = opened("s3://models/data/a-1.jsonl")
    Bucket("s3://models").put("data/a-1.jsonl", text(5, 10))
    with pytest.raises(DataError, match=r"a-1\.jsonl changed while it was read"):
        read(source)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.filterwarnings("ignore")
def test_a_file_behind_a_url(shards: Path) -> None:
    handler = partial(Quiet, directory=str(shards))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        root = f"http://127.0.0.1:{server.server_address[1]}"
        assert values(rows(f"{root}/a-2.jsonl.gz")) == ALL[10:20]
        with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
            rows(f"{root}/gone.jsonl")
    finally:
        server.shutdown()
        server.server_close()
    assert os.listdir(shards)
