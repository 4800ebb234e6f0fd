"""Read and write files; what is written has reached the disk on return."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytune_ft.records import FileRecord, to_json


def fsync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_file(path: Path, root: Path) -> FileRecord:
    """Force a file below `root` to the disk, and describe it."""
    fsync(path)
    return FileRecord(path.relative_to(root).as_posix(), path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Raises OSError, and ValueError where the file is not JSON in UTF-8."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where it cannot be read, or holds something else."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json_atomic(path: Path, value: Any) -> None:
    """Replaces a JSON file: a reader sees the old one or the new one, also after a power cut."""
    write_text_atomic(path, to_json(value, indent=2) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Replaces a text file by rename, the new content and the directory flushed to disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    write_new(temporary, text.encode())
    temporary.replace(path)
    fsync(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Creates a file, flushed to disk. Nothing is left of one that cannot be written.

    Raises:
        FileExistsError: something has that name, also a link that leads nowhere.
        OSError: it cannot be written.
    """
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `target` at the end of the context, flushed to disk.
    Where it cannot be filled, it is removed.
    """
    folder = target.with_name(f".{target.name}.new")
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in folder.iterdir():
            fsync(path)
        fsync(folder)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    fsync(target.parent)


def relative_parts(name: str) -> list[str]:
    """The parts of a relative path that was written elsewhere, such as the key of an object.

    Raises:
        ValueError: joined to a folder, it may lead out of it.
    """
    parts = name.split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a path below a folder")
    return parts


def below(root: Path, name: str) -> Path:
    """`root/name`; ValueError where it is not below `root`, also by way of a link there."""
    path = root.joinpath(*relative_parts(name))
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{name!r} leads out of its folder")
    return path
