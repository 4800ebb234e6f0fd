"""Locks keep a second process out, wait when asked to, and say where a file system has none."""

from __future__ import annotations

import errno
import fcntl
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raytune_ft import locks
from raytune_ft.errors import LockHeld, StorageError
from raytune_ft.locks import Wait, locked

RULE, REMEDY = "is driven by another process", "wait"


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from raytune_ft.locks import locked\n"
        "with locked(Path(sys.argv[1]), '', ''): print('held', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_held_lock_is_refused_at_once_or_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "TELL_EVERY_S", 0.2)
    path, told = tmp_path / ".lock", list[str]()
    with holder(path) as process:
        with pytest.raises(StorageError, match=f"{tmp_path} {RULE}; {REMEDY}"):
            locked(path, RULE, REMEDY).__enter__()
        begun = time.monotonic()
        with pytest.raises(LockHeld, match=r"also after 1 s of waiting") as caught:
            locked(path, RULE, REMEDY, Wait(1.0, told.append)).__enter__()
        assert caught.value.exit_code == 1
        assert 1 <= time.monotonic() - begun < 5
        assert 2 <= len(told) <= 6
        assert told[0] == f"{tmp_path} {RULE}; waiting 1 s at most"
        threading.Timer(0.7, process.kill).start()
        with locked(path, RULE, REMEDY, Wait(60.0)):
            assert process.wait() < 0


def test_a_holder_that_removes_the_directory_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with holder(folder / ".lock") as process:
        threading.Timer(0.7, lambda: (shutil.rmtree(folder), process.kill())).start()
        with locked(folder / ".lock", RULE, REMEDY, Wait(60.0)):
            assert process.wait() < 0
            assert (folder / ".lock").exists()


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, "not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match=r"without locks \(not here\); mount it with locks"):
        locked(tmp_path / ".lock", RULE, REMEDY, Wait(60.0)).__enter__()


def test_locks_that_keep_nobody_out_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    with pytest.raises(StorageError, match=r"without locks \(two processes can hold one\)"):
        locked(tmp_path / ".lock", RULE, REMEDY).__enter__()
