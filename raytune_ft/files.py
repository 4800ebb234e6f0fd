"""Read and write files; what is written has reached the disk on return."""

from __future__ import annotations

import hashlib
import json
import os
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


def write_json_atomic(path: Path, value: Any) -> None:
    """Replaces a JSON file: a reader sees the old one or the new one, also after a power cut."""
    write_text_atomic(path, to_json(value, indent=2) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Replaces a text file by rename, the new content and the directory flushed to disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync(path.parent)
