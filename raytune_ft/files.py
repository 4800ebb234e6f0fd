"""Files that have reached the disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from raytune_ft.records import FileRecord


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
    """In hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
