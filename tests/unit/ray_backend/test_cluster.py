"""How many groups of workers fit and run at a time, without a cluster."""

from __future__ import annotations

import datetime
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.config.search import SearchConfig
from raytune_ft.errors import ClusterError, ConfigError, DataError
from raytune_ft.ray_backend import cluster
from raytune_ft.ray_backend.cluster import (
    connect,
    connected,
    ray_directory,
    require_capacity,
    starting,
    stop_grace_s,
    whole_groups,
)
from raytune_ft.ray_backend.sweep import concurrency
from tests.support.ports import free_port


@pytest.mark.parametrize(
    ("nodes", "need", "workers", "groups"),
    [
        ([{"CPU": 2.0}], {"CPU": 1}, 2, 1),
        ([{"CPU": 2.0}], {"CPU": 1, "GPU": 0}, 1, 2),
        ([{"CPU": 2.0}], {"CPU": 1}, 3, 0),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2}, 1, 2),  # a worker is never split
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 1}, 4, 1),  # a group is, where it must
        ([{"CPU": 64.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 8.0}], {"CPU": 1, "GPU": 1}, 1, 3),
        ([{"CPU": 1.0}], {"CPU": 0.1}, 1, 10),
        ([], {"CPU": 1}, 1, 0),
    ],
)
def test_groups_are_counted_node_by_node(
    nodes: list[dict[str, float]], need: dict[str, float], workers: int, groups: int
) -> None:
    assert whole_groups(nodes, need, workers) == groups


@pytest.mark.parametrize(
    ("written", "trials", "fit", "used", "said"),
    [
        ("auto", 20, 3, 3, False),
        (2, 20, 3, 2, False),
        (8, 20, 3, 3, True),
        (8, 3, 4, 3, False),  # more would be of no use anyway
        ("auto", 2, 4, 2, False),
    ],
)
def test_a_concurrency_that_does_not_fit_is_lowered_aloud(
    written: str | int, trials: int, fit: int, used: int, said: bool
) -> None:
    search = SearchConfig.model_validate(
        {"trials": trials, "max_concurrent": written, "space": {"train.lr": {"uniform": [0, 1]}}}
    )
    assert concurrency(search, fit)[0] == used
    note = "search.max_concurrent=8 is lowered to 3: no more trials fit at a time"
    assert concurrency(search, fit)[1] == (note if said else None)


@pytest.mark.parametrize(
    ("workers", "groups"), [(1, 5), (2, 2), ([1, 2], 2), ([2, 8], 1), ([5, 6], 1)]
)
def test_places_for_runs(workers: int | list[int], groups: int) -> None:
    nodes = [{"CPU": 2.0}, {"CPU": 3.0}]
    assert require_capacity(ParallelConfig.model_validate({"workers": workers}), nodes) == groups


def test_a_range_that_no_cluster_of_this_size_meets() -> None:
    with pytest.raises(ClusterError) as raised:
        require_capacity(ParallelConfig.model_validate({"workers": [3, 4]}), [{"CPU": 2.0}])
    for word in ("parallel.workers=[3, 4]", "at least 3 CPU", "2 CPU on 1 node", "at most 2"):
        assert word in str(raised.value)


@pytest.mark.parametrize("written", ["soon", "-1", "inf", ""])
def test_a_grace_that_is_no_number(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTUNE_FT_STOP_GRACE_S", written)
    with pytest.raises(ConfigError, match="not a number of seconds"):
        stop_grace_s()


@pytest.fixture
def directories(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short directory; Ray's own variables are not set."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        yield Path(short)


def test_rays_sockets_lie_in_a_directory_that_is_short_enough(
    directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ray_directory() == "/tmp/ray"
    monkeypatch.setenv("TMPDIR", str(directories))
    assert ray_directory() == f"{directories}/ray"
    long = directories / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    assert ray_directory() == "/tmp/ray"
    monkeypatch.setenv("TMPDIR", str(directories / "none"))
    assert ray_directory() == "/tmp/ray"
    monkeypatch.setenv("RAY_TMPDIR", str(directories))
    assert ray_directory() == f"{directories}/ray"


@pytest.mark.parametrize("bytes_more", [0, 1])
def test_the_longest_socket_has_as_many_bytes_as_linux_allows(
    directories: Path, monkeypatch: pytest.MonkeyPatch, bytes_more: int
) -> None:
    now = datetime.datetime.today().strftime("%Y-%m-%d_%H-%M-%S_%f")
    inside = f"/ray/session_{now}_{2**22}/sockets/plasma_store"  # as in ray/_private/node.py
    length = 107 - len(inside) - len(str(directories)) - 1 + bytes_more
    folder = directories / ("x" * length)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    assert ray_directory() == ("/tmp/ray" if bytes_more else f"{folder}/ray")


def test_no_short_directory_is_one_line(directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SHORT_DIRS", ())
    monkeypatch.setenv("TMPDIR", "/" + "x" * 80)
    with pytest.raises(ClusterError, match=r"^TMPDIR=/x+ .*; export RAY_TMPDIR"):
        ray_directory()


def test_a_cluster_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nMore")  # as Ray does

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ClusterError) as raised:
        connect("local")
    line = str(raised.value)
    assert "cannot be started on this machine (The current node timed out during startup.)" in line
    assert "session_latest/logs" in line
    assert "\n" not in line


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of Ray, which starts nothing here."""
    made: list[str] = []
    monkeypatch.setattr(ray, "init", lambda **_: made.append("init"))
    monkeypatch.setattr(ray, "shutdown", lambda: made.append("shutdown"))
    monkeypatch.setattr(ray, "is_initialized", lambda: made[-1:] == ["init"])
    return made


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_where_nothing_answers_is_one_line(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In seconds; Ray itself tries for minutes."""
    monkeypatch.setattr(cluster, "ANSWER_S", 2.0)
    begun = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        connect(address)
    assert time.monotonic() - begun < 10
    line = str(caught.value)
    assert line.startswith(f"address={address} cannot be joined (nothing answers there within 2 s")
    assert "ray start --head" in line
    assert "\n" not in line


def test_a_head_that_starts_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[str] = []
    monkeypatch.setattr(ray, "init", lambda address, **_: joined.append(address))
    port = free_port()

    def listen() -> None:
        with socket.create_server(("127.0.0.1", port)) as server:
            server.accept()

    late = threading.Timer(1.5, listen)
    late.start()
    connect(f"127.0.0.1:{port}")
    late.join()
    connect("auto")
    assert joined == [f"127.0.0.1:{port}", "auto"]


def test_a_cluster_starts_while_its_caller_works(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    worked = threading.Event()

    def init(**_: object) -> None:
        assert worked.wait(10), "the caller waits for Ray"
        calls.append("init")

    monkeypatch.setattr(ray, "init", init)
    with starting():
        worked.set()
        for _ in range(2):
            with connected():
                assert calls == ["init"]
    assert calls == ["init", "shutdown"]
    with connected(), starting(), connected():
        assert calls == ["init", "shutdown", "init"]
    assert calls == ["init", "shutdown", "init", "shutdown"]


def test_work_that_fails_leaves_no_cluster(calls: list[str]) -> None:
    with pytest.raises(DataError), starting():
        raise DataError("rows", "are none", "write some")
    assert calls == ["init", "shutdown"]


def test_a_second_signal_leaves_no_cluster(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled = threading.Event()

    def init(**_: object) -> None:
        assert signalled.wait(10)
        calls.append("init")

    def wait(futures: object) -> None:
        signalled.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "wait", wait)
    with pytest.raises(KeyboardInterrupt), starting():
        raise KeyboardInterrupt
    assert calls == ["init", "shutdown"]
    with connected():
        assert calls == ["init", "shutdown", "init"]


def test_what_keeps_a_cluster_from_starting_is_raised_where_it_is_used(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise ValueError("no memory")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match="no memory"), starting(), connected():
        calls.append("used")
    assert "used" not in calls


def test_only_its_owner_reads_the_token_of_a_local_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token = tmp_path / ".ray" / "auth_token"

    def init(**_: object) -> None:
        """As Ray 2.60.0 does."""
        token.parent.mkdir(parents=True, exist_ok=True)
        if not token.exists():
            token.write_text("secret")
            assert mode(token) == 0o644
            assert mode(token.parent) == 0o700

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", init)
    before = os.umask(0o022)
    try:
        connect("local")
        assert mode(token) == 0o600
        assert caplog.text == ""
        token.chmod(0o644)  # of an earlier Ray
        connect("local")
        assert mode(token) == 0o600
        assert "could be read by others" in caplog.text
        other = tmp_path / "other"
        other.write_text("of somebody else")
        token.unlink()
        token.symlink_to(other)
        connect("local")
        assert mode(other) == 0o644
    finally:
        os.umask(before)


def test_a_call_without_a_cluster_starts_none() -> None:
    """As of a thread that outlives the cluster. Ray itself would start one."""
    code = (
        "from raytune_ft.ray_backend import cluster\n"
        "import ray\n"
        "try:\n"
        "    ray.put(1)\n"
        "except ray.exceptions.RayError as error:\n"
        "    print(ray.is_initialized(), error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False ")
    assert "Ray has not been started yet" in done.stdout
