"""Millions of rows in compressed shards of a bucket, prepared and trained on: memory of processes.

    python benchmarks/many_rows.py --rows 100000 1000000 10000000

A seeded script writes short rows as `.jsonl.zst` shards into an S3-speaking server (moto, in a
process of its own, from the `test` extra). `raytune-ft train` then prepares all of them, in
processes on all CPUs, and takes 100 steps of the tiny built-in model. Memory is read twice a
second, in proportional sizes, so that pages which processes share count once: anonymous, and apart
from it pages of mapped files, which the system gives up where memory is short.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_server

import psutil
import pyarrow as pa
from prepare import short_row

SHARD_ROWS = 200_000
STEPS, BATCH = 100, 16
MIB = 2**20
BUCKET = "rows"
DRIVER, OTHER, ALL, MAPPED = "driver", "largest other process", "all", "mapped"


def write_shards(rows: int) -> int:
    """Into the bucket of the environment; the bytes of their text."""
    from raytune_ft.bucket import Bucket

    bucket, draw, size = Bucket(f"s3://{BUCKET}"), random.Random(0), 0
    for first in range(0, rows, SHARD_ROWS):
        numbers = range(first, min(rows, first + SHARD_ROWS))
        text = "".join(json.dumps(short_row(draw, number)) + "\n" for number in numbers).encode()
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(text)
        bucket.put(f"{rows}/{first:09d}.jsonl.zst", bytes(sink.getvalue()))
        size += len(text)
    return size


@contextmanager
def bucket_server() -> Iterator[None]:
    """A server of its own, and the variables that lead to it."""
    with create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",  # pragma: allowlist secret
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        import boto3
        from botocore.config import Config

        client = boto3.client("s3", config=Config(retries={"max_attempts": 20}))
        client.create_bucket(Bucket=BUCKET)
        yield
    finally:
        server.terminate()
        server.wait()


def sizes_of(pid: int) -> dict[str, float]:
    """MiB of a process by the names of `smaps_rollup`."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = (line.split() for line in lines)
    return {name.rstrip(":"): int(size) / 1024 for name, size, *_ in found}


def peaks_of(command: list[str], log: Path) -> tuple[dict[str, float], float, float]:
    """Runs a command: the peak of each kind of its processes and of all, MiB; wall and CPU s."""
    begun, peaks, seconds = time.monotonic(), dict[str, float](), dict[int, float]()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        now = dict.fromkeys((DRIVER, OTHER, ALL, MAPPED), 0.0)
        try:
            for one in (driver, *driver.children(recursive=True)):
                sizes = sizes_of(one.pid)
                kind = DRIVER if one.pid == driver.pid else OTHER
                now[kind] = max(now[kind], sizes["Pss_Anon"])
                now[ALL] += sizes["Pss_Anon"]
                now[MAPPED] += sizes["Pss_File"]
                times = one.cpu_times()
                seconds[one.pid] = times.user + times.system
        except (psutil.Error, OSError, KeyError):  # a process has ended meanwhile
            continue
        peaks = {kind: max(peaks.get(kind, 0.0), size) for kind, size in now.items()}
        time.sleep(0.5)
    assert process.returncode == 0, log.read_text()[-2000:]
    return peaks, time.monotonic() - begun, sum(seconds.values())


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    asked = parser.parse_args()
    print(
        f"| rows | text, MB | wall s | CPU s | {DRIVER}, MiB | {OTHER} | {ALL} | {MAPPED} | steps |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with bucket_server(), tempfile.TemporaryDirectory() as folder:
        for rows in asked.rows:
            size = write_shards(rows)
            config = Path(folder) / f"{rows}.yaml"
            config.write_text(
                f"name: rows-{rows}\nstorage: {folder}/runs\nmodel: {{path: builtin:tiny}}\n"
                f"data: {{train: {{path: 's3://{BUCKET}/{rows}/*'}}, validation: 0.0001}}\n"
                f"train: {{batch_size: {BATCH}, max_examples: {STEPS * BATCH}}}\n"
            )
            line = [sys.executable, "-m", "raytune_ft", "train", str(config)]
            peaks, wall, cpu = peaks_of(line, Path(folder) / f"{rows}.log")
            run = Path(folder) / "runs" / f"rows-{rows}"
            final = json.loads((run / "result.json").read_text())["final"]
            report = json.loads((run / "data.json").read_text())["splits"]
            counted = sum(split["examples"] for split in report.values())
            assert counted == rows, (counted, rows)
            cells = [f"{each:,.0f}" for each in (rows, size / 1e6, wall, cpu, *peaks.values())]
            print("|", " | ".join([*cells, str(final["step"])]), "|", flush=True)


if __name__ == "__main__":
    main()
