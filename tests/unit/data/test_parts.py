"""The tokens do not depend on how the rows were cut, on who read them, or on who died."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from transformers import PreTrainedTokenizerBase

from raytune_ft.config.data import DataConfig
from raytune_ft.data import processes
from raytune_ft.data.matches import count_matches, first_equal, keyed
from raytune_ft.data.order import quotas_of
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.processes import LocalProcesses, Server, started_ahead
from raytune_ft.errors import DataError, RunFailed, StorageError
from tests.support.commands import started

WORDS = [f"w{number}" for number in range(200)]


def write_rows(path: Path, count: int, seed: int = 0, **more: Any) -> Path:
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        row = {
            "prompt": " ".join(draw.choices(WORDS[:20], k=2)),
            "completion": " ".join(draw.choices(WORDS, k=draw.randint(1, 40))),
            **more,
        }
        lines.append("" if number % 97 == 5 else json.dumps(row))  # blank lines are bad rows
    path.write_text("\n".join(lines) + "\n\n\n")
    return path


def content(prepared: PreparedData) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in prepared.path.iterdir()}


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    train = [
        {"path": str(write_rows(tmp_path / "a.jsonl", 2000, 1))},
        {"path": str(write_rows(tmp_path / "b.jsonl", 700, 2))},
    ]
    test = {"path": str(write_rows(tmp_path / "c.jsonl", 300, 1))}
    return DataConfig.model_validate(
        {"train": train, "test": test, "max_bad_fraction": 0.2, "max_length": 64}
    )


Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepare(data: DataConfig, tiny: PreTrainedTokenizerBase, tmp_path: Path) -> Iterator[Prepare]:
    """Each time into an empty cache."""

    def run(**how: Any) -> PreparedData:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        return prepare_data(data, tiny, 0, tmp_path / "cache", **how)

    yield run
    assert not [file for file in (tmp_path / "cache").iterdir() if file.name.startswith(".")]


def test_the_size_of_the_parts_changes_no_byte(prepare: Prepare) -> None:
    expected = content(prepare())
    report = json.loads(expected["report.json"])
    assert report["sources"]["train.a"]["bad"] == {"empty": 21}
    assert report["sources"]["train.a"]["first_bad"]["empty"].startswith("a.jsonl:6: ")
    assert report["duplicates"]["train/test"] > 200
    for piece_bytes in (1, 1000, 33_333, 10**9):
        assert content(prepare(piece_bytes=piece_bytes)) == expected


def test_a_mix_of_ten_sources(tiny: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """With weights, each of several shards; another source repeats a part of the first."""
    sources = []
    for number in range(10):
        for shard in range(2):
            write_rows(tmp_path / f"s{number}-{shard}.jsonl", 60 + number, max(number, 1) + shard)
        sources.append({"path": f"{tmp_path}/s{number}-*.jsonl", "weight": 1 + number % 3})
    data = DataConfig.model_validate({"train": sources, "max_bad_fraction": 0.2})
    found = []
    for size in (None, 2000):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        prepared = prepare_data(data, tiny, 0, tmp_path / "cache", piece_bytes=size)
        found.append(content(prepared))
        assert len(prepared.report.splits["train"].sources) == 10
        assert prepared.report.duplicates["train.s0/train.s1"] > 100
        quotas = quotas_of(data, prepared.train)
        assert abs(quotas[1] - 2 * quotas[0]) <= 1
        assert abs(quotas[2] - 3 * quotas[0]) <= 2
    assert found[0] == found[1]


def children() -> list[psutil.Process]:
    return started(lambda words: "raytune_ft.data.worker" in words)


def test_a_process_that_is_killed_costs_its_part(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(prepare())
    killed, given = list[int](), list[int]()
    give = processes._Process.give

    def record(self: Any, number: int) -> None:
        given.append(number)
        give(self, number)
        if not killed and len(given) == 4:
            os.kill(self.pid, signal.SIGKILL)
            killed.append(number)

    monkeypatch.setattr(processes._Process, "give", record)
    lines: list[str] = []
    workers = LocalProcesses(2)
    found = content(prepare(piece_bytes=20_000, workers=workers, progress=lines.append))
    assert found == expected
    assert killed
    assert given.count(killed[0]) == 2  # and no other part was made twice
    assert len(given) == len(set(given)) + 1
    assert any("parts in 2 processes" in line for line in lines)
    assert not children()


def test_one_thread_forks_and_a_killed_server_is_replaced(
    prepare: Prepare, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork takes no other thread along, and so may leave a lock held. The server outlasts a use,
    and the parts of one that is killed are made again.
    """
    expected = content(prepare())
    threads, servers = list[int](), set[int]()
    fork, give = Server.fork, processes._Process.give

    def count_threads(self: Server) -> Any:
        made = fork(self)
        threads.append(len(list(Path(f"/proc/{self.process.pid}/task").iterdir())))
        servers.add(self.process.pid)
        return made

    def kill(self: Any, number: int) -> None:
        if len(servers) == 1 and number == 3:
            os.kill(next(iter(servers)), signal.SIGKILL)
            assert wait([self.channel], 30)  # what it has forked ends with it
        give(self, number)

    monkeypatch.setattr(Server, "fork", count_threads)
    with started_ahead(data, 2) as workers:
        assert content(prepare(piece_bytes=20_000, workers=workers)) == expected
        assert len(threads) == 2
        assert len(servers) == 1
        monkeypatch.setattr(processes._Process, "give", kill)
        assert content(prepare(piece_bytes=20_000, workers=workers)) == expected
    assert len(servers) == 2
    assert set(threads) == {1}
    assert not children()


def test_processes_that_always_die_end_the_run(
    data: DataConfig,
    tiny: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    give = processes._Process.give

    def kill(self: Any, number: int) -> None:
        give(self, number)
        if number == 1:
            os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(processes._Process, "give", kill)
    workers = LocalProcesses(2)
    with pytest.raises(RunFailed, match=r"3 processes died while they made part 1 \(SIGKILL\)"):
        prepare_data(data, tiny, 0, tmp_path / "cache", workers=workers, piece_bytes=20_000)
    assert not children()


DRIVER = """
import json, sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from transformers import AutoTokenizer
from raytune_ft.config.data import DataConfig
from raytune_ft.data import tokenise
from raytune_ft.data.order import quotas_of
from raytune_ft.data.prepare import prepare_data

prepare_data(
    DataConfig.model_validate(json.loads(sys.argv[1])),
    AutoTokenizer.from_pretrained(sys.argv[2]), 0, Path(sys.argv[3]), print, piece_bytes=5000,
)
"""


def test_a_driver_that_is_killed_is_resumed(
    data: DataConfig, tiny: PreTrainedTokenizerBase, tiny_path: str, tmp_path: Path
) -> None:
    expected = content(prepare_data(data, tiny, 0, tmp_path / "whole"))
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", DRIVER, data.model_dump_json(), tiny_path, cache]
    driver = subprocess.Popen(command)
    while len(list(cache.glob(".parts-*/*.json"))) < 3:
        assert driver.poll() is None
        time.sleep(0.001)
    driver.kill()
    driver.wait()
    assert not [entry for entry in cache.iterdir() if not entry.name.startswith(".")]
    made = {file: file.stat().st_mtime_ns for file in cache.glob(".parts-*/*.json")}
    seen: dict[Path, int] = {}
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        seen.update({file: file.stat().st_mtime_ns for file in made if file.exists()})

    resumed = prepare_data(data, tiny, 0, cache, tell, piece_bytes=5000)
    assert content(resumed) == expected
    assert seen == made
    assert any(f"{len(made)} of " in line and "earlier process" in line for line in lines)
    assert [entry.name for entry in cache.iterdir()] == [resumed.path.name]


def test_the_first_bad_part_is_the_one_that_is_named(
    data: DataConfig, tiny: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    strict = data.model_copy(update={"too_long": "error", "max_length": 40})
    found = []
    for workers, size in ((None, None), (LocalProcesses(2), 9000)):
        with pytest.raises(DataError, match=r"over data\.max_length=40") as refused:
            prepare_data(strict, tiny, 0, tmp_path / "cache", workers=workers, piece_bytes=size)
        found.append(str(refused.value))
        assert list((tmp_path / "cache").iterdir()) == []
    assert found[0] == found[1]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    data: DataConfig,
    tiny: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raytune_ft.data.prepare.ROOM_CHECKED", 1000)
    space = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space._replace(free=100_000))
    with pytest.raises(StorageError, match=r"has 97\.7 KiB free, and the tokens .* need about"):
        prepare_data(data, tiny, 0, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("total", [0, 1, 1000, 300_000])
def test_matches_are_those_of_sets(
    total: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.data.matches.TOGETHER", 20_000)
    draw = np.random.default_rng(total)
    values, classes = draw.integers(0, total // 3 + 1, total), draw.integers(0, 3, total)
    keys = np.zeros((total, 16), np.uint8)
    spread = values.astype("<u8") * np.uint64(0x9E3779B97F4A7C15)
    keys[:, :8] = spread.view(np.uint8).reshape(-1, 8)
    cuts = [*range(0, total, 7001), total]
    places = np.arange(total)
    numbered = (keyed(keys[a:b], places[a:b]) for a, b in pairwise(cuts))
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    firsts = first_equal(numbered, total, tmp_path, np.empty)
    assert np.array_equal(firsts, first[inverse])
    blocks = (keyed(keys[a:b], classes[a:b]) for a, b in pairwise(cuts))
    found = count_matches(blocks, total, 3, tmp_path)
    known = [set(values[classes == one].tolist()) for one in range(3)]
    assert found.distinct.tolist() == [len(one) for one in known]
    for a in range(3):
        for b in range(3):
            shared = sum(value in known[a] for value in values[classes == b].tolist())
            assert found.shared[a, b] == shared
    assert not list(tmp_path.iterdir())
