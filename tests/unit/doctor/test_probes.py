"""What a probe sees on this machine, with causes that are planted in it."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import raytune_ft
from raytune_ft.doctor import probes


def test_the_versions_are_those_that_are_installed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = probes.versions({})
    assert before["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(probes.PACKAGES) < set(before)
    installed = tmp_path / "transformers-4.0.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert probes.versions({}) == before | {"transformers": "4.0"}


def test_another_checkout_of_the_same_version_has_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.py").write_text("x = 1\n")
    monkeypatch.setattr(probes, "_folder", lambda module: tmp_path)
    first = probes._hash_of_code("raytune_ft")
    (tmp_path / "one.py").write_text("x = 2\n")
    assert probes._hash_of_code("raytune_ft") != first
    monkeypatch.undo()
    assert probes._folder("raytune_ft") == Path(raytune_ft.__file__).parent
    assert probes._hash_of_code("no_such_module") == "absent"


def command(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_gpus_are_listed_by_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    command(tmp_path, "python", '[ -z "${CUDA_VISIBLE_DEVICES+x}" ] && echo 1', monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as Ray sets it where no GPU is reserved
    command(tmp_path, "nvidia-smi", "echo 'H100, 590.1'; echo 'H100, 590.1'", monkeypatch)
    found = probes.gpus({}, expected=False)
    assert found == {"listed": [["H100", "590.1"]] * 2, "usable": 1}
    command(tmp_path, "nvidia-smi", "echo driver mismatch; exit 18", monkeypatch)
    assert probes.gpus({}, expected=False) == {"listed": [], "usable": None}


def test_a_full_disk_is_that_of_the_nearest_parent(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "yet"
    assert probes.existing(path) == tmp_path
    assert probes.disk({}, str(path))["storage"][1] > 0


def test_files_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "READ_S", 0.5)
    probes.write({}, str(tmp_path), "a", "text")
    (tmp_path / "b").write_text("something else")
    assert probes.unreadable({}, str(tmp_path), "text", ["a", "b", "c"]) == ["b", "c"]
    threading.Timer(0.2, (tmp_path / "c").write_text, ["text"]).start()  # NFS takes its time
    assert probes.unreadable({}, str(tmp_path), "text", ["a", "c"]) == []
    with pytest.raises(FileExistsError):
        probes.write({}, str(tmp_path), "a", "text")


def test_a_lock_keeps_others_out(tmp_path: Path) -> None:
    kept: dict[str, Any] = {}
    path = str(tmp_path / "lock")
    assert probes.takes_lock({}, path)
    probes.hold_lock(kept, path)
    assert not probes.takes_lock({}, path)
    kept["lock"].close()
    assert probes.takes_lock({}, path)


def test_who_connects_and_who_does_not() -> None:
    kept: dict[str, Any] = {}
    port = probes.listen(kept, "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        peers = {"open": ("127.0.0.1", port), "closed": closed.getsockname()}
        found = probes.unconnected({}, peers)
    kept["server"].close()
    assert set(found) == {"closed"}
    assert "refused" in found["closed"]


def test_the_mode_of_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert probes.token_mode({}) is None
    file.touch()
    file.chmod(0o644)
    assert probes.token_mode({}) == 0o644


@pytest.mark.parametrize(("seconds", "size"), [(0.001, 64), (0.1, 10), (0.6, 1), (9.0, 1)])
def test_a_slow_network_gets_small_messages(seconds: float, size: int) -> None:
    assert probes._message_bytes(seconds) == size * 2**20
