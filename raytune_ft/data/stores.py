"""Files of sources on other machines: listed by one request, and copied whole before they are read.

`s3://` goes through boto3, as checkpoints do; other URLs go through fsspec and its package for that
store. Credentials come from the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from raytune_ft.bucket import Bucket
from raytune_ft.config.environment import without_secrets
from raytune_ft.config.paths import OBJECT_STORE, is_glob
from raytune_ft.config.reference import one_of
from raytune_ft.errors import ConfigError, DataError, StorageError, first_line

PACKAGES = {
    "s3": "raytune-ft[s3]",
    "gs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
}
"""Scheme of a URL -> the package that reads it."""


@dataclass(frozen=True)
class Remote:
    """A file in a store; `stamp` is another one once its content has changed."""

    url: str
    size: int
    stamp: str


class Store(Protocol):
    """What reads the URLs of one scheme."""

    def find(self, url: str) -> list[Remote]:
        """The file of that URL, those that match it, or all below it."""

    def stamp(self, url: str) -> str:
        """`Remote.stamp` of a file."""

    def copy(self, url: str, target: Path) -> None:
        """Download a file."""


def files_at(url: str) -> list[Remote]:
    """The files that a URL stands for, sorted by name: itself, those that match a glob, or all
    below a folder. Hidden ones, whose names begin with a dot or an underscore, are left out.

    Raises:
        DataError: the store refuses or does not answer, or nothing reads such URLs.
    """
    with _explained(url):
        found = _store(url).find(url)
    if len(found) == 1 and found[0].url == url:
        return found
    return sorted((one for one in found if not _hidden(one.url)), key=lambda one: one.url)


def copy_to(file: Remote, target: Path) -> None:
    """Download a file. Raises DataError, see `files_at`, and where its content has changed."""
    store = _store(file.url)
    with _explained(file.url):
        store.copy(file.url, target)
        same = store.stamp(file.url) == file.stamp
    if not same:
        raise DataError(file.url, "changed while it was read", "write it once, then start again")


def _hidden(url: str) -> bool:
    return PurePosixPath(url).name.startswith((".", "_"))


def _store(url: str) -> Store:
    scheme = url.partition("://")[0]
    if scheme not in PACKAGES:
        known = one_of([f"{name}://" for name in PACKAGES])
        raise DataError(url, "is a URL that nothing here reads", f"write one that begins {known}")
    return _Bucket() if url.startswith(OBJECT_STORE) else _Fsspec()


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Errors of a store as DataErrors."""
    scheme = url.partition("://")[0]
    try:
        yield
    except ImportError as error:
        package = PACKAGES[scheme]
        raise DataError(
            url, f"needs a package that is not installed ({error})", f"pip install {package}"
        ) from None
    except ConfigError as error:
        raise DataError(url.rpartition("@")[2], error.rule, error.remedy) from None
    except StorageError as error:
        raise DataError(error.value, error.rule, error.remedy) from None
    except FileNotFoundError:
        raise DataError(url, "does not exist", "write the URL of an existing file") from None
    except PermissionError as error:
        raise DataError(
            url,
            f"refuses ({without_secrets(first_line(error), url)})",
            "write one that these credentials reach",
        ) from None
    except Exception as error:  # noqa: BLE001 - each package has exceptions of its own
        why = without_secrets(first_line(error), url)
        raise DataError(url, f"cannot be read ({why})", "try again when it answers") from None


class _Bucket:
    def find(self, url: str) -> list[Remote]:
        root, _, key = url.removeprefix(OBJECT_STORE).partition("/")
        bucket = _bucket(root)
        fixed = key[: match.start()] if (match := re.search(r"[*?\[]", key)) else key
        found = [
            Remote(f"{OBJECT_STORE}{root}/{name}", size, tag)
            for name, (size, tag) in bucket.objects(fixed).items()
        ]
        return matching(url, found)

    def stamp(self, url: str) -> str:
        root, _, key = url.removeprefix(OBJECT_STORE).partition("/")
        return _bucket(root).objects(key).get(key, (0, ""))[1]

    def copy(self, url: str, target: Path) -> None:
        root, _, key = url.removeprefix(OBJECT_STORE).partition("/")
        _bucket(root).download(key, target)


def _bucket(root: str) -> Bucket:
    return _client(root, os.environ.get("AWS_ENDPOINT_URL"))


@lru_cache(maxsize=8)
def _client(root: str, endpoint: str | None) -> Bucket:
    return Bucket(OBJECT_STORE + root)


class _Fsspec:
    def find(self, url: str) -> list[Remote]:
        system, path = _opened(url)
        if is_glob(url):
            names = system.glob(path)
        else:
            names = [path] if system.isfile(path) else system.find(path)
        infos = [(system.unstrip_protocol(name), system.info(name)) for name in names]
        return [
            Remote(name, int(info.get("size") or 0), _mark(info))
            for name, info in infos
            if info["type"] == "file"
        ]

    def stamp(self, url: str) -> str:
        system, path = _opened(url)
        system.invalidate_cache()
        return _mark(system.info(path))

    def copy(self, url: str, target: Path) -> None:
        system, path = _opened(url)
        system.get_file(path, str(target))


def _opened(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    return system, path


def _mark(info: dict[str, Any]) -> str:
    names = ("etag", "ETag", "md5Hash", "generation", "last_modified", "mtime", "size")
    return ", ".join(f"{name}={info[name]}" for name in names if info.get(name) is not None)


def matching(url: str, found: Sequence[Remote]) -> list[Remote]:
    """Those of all files that begin like a URL that it stands for."""
    if is_glob(url):
        pattern = _pattern(url)
        return [one for one in found if pattern.fullmatch(one.url)]
    own = [one for one in found if one.url == url]
    return own or [one for one in found if one.url.startswith(url.rstrip("/") + "/")]


def _pattern(glob: str) -> re.Pattern[str]:
    """As the shell reads it: `*` stays within a folder, `**/` is any folders."""
    known = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}
    written = []
    for part in re.split(r"(\*\*/|\*|\?|\[[^]]+\])", glob):
        if part.startswith("[") and part.endswith("]"):
            written.append(re.sub(r"^\[!", "[^", part))
        else:
            written.append(known.get(part) or re.escape(part))
    return re.compile("".join(written))
