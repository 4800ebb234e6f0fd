"""Files that are replaced whole, and names that were written elsewhere."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from raytune_ft.files import below, new_folder, write_new, write_text_atomic


@pytest.mark.parametrize("name", ["", ".", "..", "/a", "a//b", "a/", "a/../b", "a\\b", "a\0b"])
def test_no_path_out_of_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a path below a folder"):
        below(tmp_path, name)


def test_nor_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads out of its folder"):
        below(tmp_path / "in", "link/x")
    assert below(tmp_path / "in", "..a/b c/\u00e9") == tmp_path / "in" / "..a" / "b c" / "\u00e9"


def test_no_name_of_a_temporary_file_can_be_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".config.yaml.{os.getpid()}").symlink_to(victim)
    seen = []
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (seen.append(self.name), replace(self, target))
    )
    for text in ("one", "two"):
        write_text_atomic(tmp_path / "config.yaml", text)
    assert victim.read_text() == "mine"
    assert (tmp_path / "config.yaml").read_text() == "two"
    assert len(set(seen)) == 2
    umask = os.umask(0o022)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) == 0o666 & ~umask


def test_a_new_file_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "link", b"owned")
    assert not (tmp_path / "victim").exists()


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target, hidden = tmp_path / "made", tmp_path / ".made.new"
    hidden.mkdir()
    (hidden / "left").touch()  # by a process that was killed
    with pytest.raises(FileNotFoundError), new_folder(target) as folder:
        (folder / "part").write_text((folder / "missing").read_text())
    assert not list(tmp_path.iterdir())
    with new_folder(target) as folder:
        write_new(folder / "file", b"whole")
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in target.iterdir()] == ["file"]
