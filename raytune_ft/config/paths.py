"""Relative paths become absolute once; a path that begins with `${NAME}` is kept as written."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath

from raytune_ft.config.environment import STORAGE_VARIABLE, expand_text
from raytune_ft.errors import ConfigError, StorageError

BUILTIN = "builtin:"
OBJECT_STORE = "s3://"
_SQLITE = "sqlite:///"
_LOCAL = ("./", "../", "~", "/")
_BUCKET = re.compile(r"[a-z0-9$][\w.${}-]*(/[^@]*)?$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
"""Extensions of sources. No other one marks a path as a file: hub ids hold version numbers."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Extension behind that of a text file -> how its bytes are compressed."""


def storage(written: str, cwd: Path, disposable_cwd: bool) -> str:
    """The directory or URL of runs; StorageError for a directory that would not outlive the run."""
    check_storage(written)
    remote = expand_text(written, "storage").startswith(OBJECT_STORE)
    if not disposable_cwd or not (remote or _is_relative(written, "storage")):
        return written.rstrip("/") if remote else absolute(written, cwd, "storage")
    root = os.environ.get(STORAGE_VARIABLE, "")
    if remote and os.path.isabs(root):
        return written.rstrip("/")
    if not os.path.isabs(root):
        raise StorageError(
            f"storage={written}",
            "needs a local directory for the run, inside a Ray job or on several nodes"
            if remote
            else "is relative, and inside a Ray job or on several nodes the current directory is "
            "disposable",
            f"write a path that every node reaches, or set {STORAGE_VARIABLE} to one",
        )
    return os.path.normpath(os.path.join(root, written))


def check_storage(written: str) -> None:
    """ConfigError for a URL that is not s3://bucket/prefix."""
    scheme, colon, rest = written.partition("://")
    if not colon or (scheme == "s3" and _BUCKET.match(rest)):
        return
    raise ConfigError(
        f"storage={scheme}://...",
        "is a URL, and not one of a bucket",
        "write a directory, or s3://bucket/prefix with credentials in the environment",
    )


def model(written: str, cwd: Path) -> str:
    """A local directory as an absolute path; a hub id and `builtin:` as they are."""
    return written if written.startswith(BUILTIN) else source(written, cwd, "model.path")


def sources(written: str | list[str], cwd: Path, key: str) -> str | list[str]:
    """Each path of a source, see `source`."""
    if isinstance(written, str):
        return source(written, cwd, key)
    return [source(each, cwd, key) for each in written]


def source(written: str, cwd: Path, key: str) -> str:
    """A file, a folder or a glob as an absolute path; a hub id or a URL as it is."""
    if is_url(written):
        return written
    is_local = _looks_local(expand_text(written, key)) or _exists(written, cwd, key)
    return absolute(written, cwd, key) if is_local else written


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist is owner/name, of a model or a data set on the hub."""
    return bool(_HUB_ID.fullmatch(path)) and not _looks_local(path)


def is_url(path: str) -> bool:
    """Whether a source is below a bucket or on another server."""
    return "://" in path


def is_glob(path: str) -> bool:
    """Whether a path stands for all files that match it."""
    return any(sign in path for sign in "*?[")


def file_kind(path: str) -> tuple[str, str | None]:
    """The extension of a source's file and its compression: ".jsonl", "zstd" of a.jsonl.zst."""
    name = PurePath(path)
    compression = COMPRESSIONS.get(name.suffix.lower())
    return (PurePath(name.stem) if compression else name).suffix.lower(), compression


def is_hub_model(path: str) -> bool:
    """Whether a model's path is an id of the hub; old ones have no owner."""
    if path.startswith((BUILTIN, ".", "~", "/")) or path.count("/") > 1:
        return False
    return not Path(path).is_dir()


def _looks_local(path: str) -> bool:
    return path.startswith(_LOCAL) or is_glob(path) or file_kind(path)[0] in FILE_KINDS


def study(written: str | None, cwd: Path) -> str | None:
    """The Optuna URL, with the path of an SQLite file made absolute."""
    if written is None or not written.startswith(_SQLITE):
        return written
    return _SQLITE + absolute(written.removeprefix(_SQLITE), cwd, "search.storage")


def folders(written: str | list[str] | None, cwd: Path) -> list[str] | None:
    """The directories of earlier sweeps, made absolute."""
    if written is None:
        return None
    names = [written] if isinstance(written, str) else written
    return [absolute(name, cwd, "search.warm_start") for name in names]


def absolute(written: str, cwd: Path, key: str) -> str:
    """An absolute path, `~` expanded, `${NAME}` kept."""
    if not _is_relative(written, key):
        return os.path.expanduser(written)
    return os.path.normpath(os.path.join(cwd, written))


def _is_relative(written: str, key: str) -> bool:
    return not os.path.isabs(os.path.expanduser(expand_text(written, key)))


def _exists(written: str, cwd: Path, key: str) -> bool:
    try:
        return (cwd / os.path.expanduser(expand_text(written, key))).exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL byte: no local path
        return False
