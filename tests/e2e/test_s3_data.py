"""A run whose rows are compressed shards in a bucket."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from raytune_ft.bucket import Bucket
from raytune_ft.cli import run_command
from tests.support.s3 import s3_server

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]


def test_a_run_on_shards_of_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with s3_server() as (host, port):
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "swordfish",  # pragma: allowlist secret
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        bucket = Bucket("s3://models")
        for shard in range(4):
            rows = [
                {"prompt": f"ask {n}", "completion": "say"}
                for n in range(shard * 50, shard * 50 + 50)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
            if shard % 2:
                bucket.put(f"rows/{shard}.jsonl.gz", gzip.compress(text))
                continue
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(text)
            bucket.put(f"rows/{shard}.jsonl.zst", bytes(sink.getvalue()))
        config = tmp_path / "a.yaml"
        config.write_text(
            f"name: shards\nstorage: {tmp_path / 'runs'}\nmodel: {{path: builtin:tiny}}\n"
            "data: {train: {path: 's3://models/rows/*'}}\n"
            "train: {batch_size: 8, max_examples: 160}\n"
        )
        assert run_command(["train", str(config)]) == 0
        said = capsys.readouterr()
        assert "data.train: 200 of 200 rows usable" in said.out
        assert "swordfish" not in said.out + said.err
        result = json.loads((tmp_path / "runs" / "shards" / "result.json").read_text())
        assert (result["status"], result["final"]["examples"]) == ("completed", 160)
        data = json.loads((tmp_path / "runs" / "shards" / "data.json").read_text())
        assert data["sources"]["train"]["name"] == "*"
        assert (
            run_command(["data", "check", str(config), "data.train.path=s3://models/none/*"]) == 2
        )
        assert capsys.readouterr().err.startswith(
            "error: data.train.path=s3://models/none/* matches no file; write the URL of files"
        )
