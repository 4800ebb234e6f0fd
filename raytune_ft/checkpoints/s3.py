"""Objects below `s3://bucket/prefix`: every call is bounded in time and tried again a few times.

Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL), and are never part of a message.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from raytune_ft.checkpoints.manifest import parse_manifest
from raytune_ft.errors import CheckpointError, ConfigError, StorageError
from raytune_ft.layout import MANIFEST, STEP_NAME
from raytune_ft.records import CheckpointManifest


class RemoteCheckpoints:
    """The checkpoints below one key, such as `NAME/checkpoints`."""

    def __init__(self, bucket: Bucket, root: str) -> None:
        self.bucket, self.root = bucket, root.strip("/")

    def names(self) -> list[str]:
        """Of those that are committed, by ascending step."""
        found = [
            PurePosixPath(key).parent.name
            for key in self.bucket.sizes(self._key(""))
            if PurePosixPath(key).name == MANIFEST
            and STEP_NAME.fullmatch(PurePosixPath(key).parent.name)
        ]
        return sorted(found, key=lambda name: int(name.partition("-")[2]))

    def manifest(self, name: str) -> CheckpointManifest:
        """
        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        raw = self.bucket.get(self._key(name, MANIFEST))
        if raw is None:
            raise CheckpointError(f"{self._url(name)} is missing")
        return parse_manifest(raw, self._url(name, MANIFEST))

    def upload(self, folder: Path) -> None:
        """A checkpoint of the local disk; one of that name with another content is replaced.

        Raises:
            FileNotFoundError: it was deleted meanwhile; nothing is committed.
            StorageError: the store does not answer; nothing is committed.
        """
        raw = (folder / MANIFEST).read_bytes()
        manifest = parse_manifest(raw, str(folder / MANIFEST))
        before = self.bucket.get(self._key(folder.name, MANIFEST))
        if before == raw:
            return
        if before is not None:
            self.bucket.delete(self._key(folder.name, MANIFEST))
        for record in manifest.files:
            self.bucket.upload(folder / record.path, self._key(folder.name, record.path))
        held = self.bucket.sizes(self._key(folder.name, ""))
        for record in manifest.files:
            if held.get(self._key(folder.name, record.path)) != record.bytes:
                raise FileNotFoundError(f"{folder / record.path} changed while it was uploaded")
        self.bucket.put(self._key(folder.name, MANIFEST), raw)

    def verify(self, name: str) -> CheckpointManifest:
        """Read every byte of a checkpoint.

        Raises:
            CheckpointError: names the file and what is wrong with it.
        """
        manifest = self.manifest(name)
        held = self.bucket.sizes(self._key(name, ""))
        for record in manifest.files:
            key = self._key(name, record.path)
            url = self._url(name, record.path)
            if key not in held:
                raise CheckpointError(f"{url} is missing")
            if held[key] != record.bytes:
                raise CheckpointError(
                    f"{url} is damaged: {held[key]} bytes, the manifest says {record.bytes}"
                )
            digest = hashlib.sha256()
            for block in self.bucket.blocks(key, record.bytes):
                digest.update(block)
            if digest.hexdigest() != record.sha256:
                raise CheckpointError(
                    f"{url} is damaged: sha256 {digest.hexdigest()[:12]}..., "
                    f"the manifest says {record.sha256[:12]}..."
                )
        return manifest

    def fetch(self, name: str, target: Path) -> None:
        """Into `target/name`, which appears by one rename; what is there already stays.

        Raises:
            CheckpointError: it is not there, or a file is missing.
        """
        raw = self.bucket.get(self._key(name, MANIFEST))
        if raw is None:
            raise CheckpointError(f"{self._url(name)} is missing")
        final, folder = target / name, target / f".{name}.fetched"
        if final.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        held = self.bucket.sizes(self._key(name, ""))
        for record in parse_manifest(raw, self._url(name, MANIFEST)).files:
            key = self._key(name, record.path)
            if key not in held:
                raise CheckpointError(f"{self._url(name, record.path)} is missing")
            self.bucket.download(key, held[key], folder / record.path)
        (folder / MANIFEST).write_bytes(raw)
        folder.rename(final)

    def delete(self, name: str) -> None:
        """The manifest first, so that no half of it is ever seen."""
        self.bucket.delete(self._key(name, MANIFEST))
        for key in self.bucket.sizes(self._key(name, "")):
            self.bucket.delete(key)

    def quarantine(self, name: str) -> str:
        """A damaged checkpoint is no checkpoint any more: its manifest goes by another name."""
        raw = self.bucket.get(self._key(name, MANIFEST)) or b""
        key = self._key(name, f"damaged.{MANIFEST}")
        self.bucket.put(key, raw)
        self.bucket.delete(self._key(name, MANIFEST))
        return f"{self.bucket.url}/{key}"

    def clear(self, keep: Collection[str]) -> None:
        """Delete files of attempts that were never committed, but for those of `keep`."""
        whole = set(self.names()) | set(keep)
        for key in self.bucket.sizes(self._key("")):
            name = key.removeprefix(self._key("")).split("/")[0]
            if STEP_NAME.fullmatch(name) and name not in whole and "/damaged." not in key:
                self.bucket.delete(key)

    def _key(self, *parts: str) -> str:
        return "/".join((self.root, *parts)) if self.root else "/".join(parts)

    def _url(self, *parts: str) -> str:
        return f"{self.bucket.url}/{self._key(*parts)}"


SCHEME = "s3://"
ATTEMPTS = 5
CONNECT_TIMEOUT_S, READ_TIMEOUT_S, FIRST_PAUSE_S = 5.0, 20.0, 0.5
_DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403")
_ABSENT = ("NoSuchKey", "404", "NotFound")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """How long a call may take and how often it is made. A pause doubles from one to the next."""

    attempts: int = ATTEMPTS
    connect_s: float = CONNECT_TIMEOUT_S
    read_s: float = READ_TIMEOUT_S
    pause_s: float = FIRST_PAUSE_S


class Bucket:
    """What lies below a URL, by keys relative to it."""

    def __init__(self, url: str, timing: Timing | None = None) -> None:
        """
        Raises:
            ConfigError: it is no URL of a bucket, or the client is not installed.
        """
        bucket, _, prefix = url.removeprefix(SCHEME).strip("/").partition("/")
        self.url = f"{SCHEME}{bucket}/{prefix}".rstrip("/")
        if not url.startswith(SCHEME) or not bucket or "@" in bucket:
            raise ConfigError(
                f"storage={url.rsplit('@', 1)[-1]}",
                "is no URL of a bucket",
                "write s3://bucket/prefix, and credentials into the environment",
            )
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._timing = timing or Timing()
        self._client = _client(self._timing)

    def put(self, key: str, data: bytes) -> None:
        """One object, by one request: readers see the old one or the new one."""
        name = self._prefix + key
        self._try(
            key,
            lambda: self._client.put_object(
                Bucket=self._bucket, Key=name, Body=data, ChecksumAlgorithm="CRC32"
            ),
        )

    def upload(self, path: Path, key: str) -> None:
        """A file of any size; nothing is visible until its last part has arrived.

        Raises:
            FileNotFoundError: the file has gone.
        """
        name = self._prefix + key
        self._try(key, lambda: self._client.upload_file(str(path), self._bucket, name))

    def get(self, key: str) -> bytes | None:
        """The content, None where there is none."""
        name = self._prefix + key

        def read() -> bytes | None:
            try:
                found = self._client.get_object(Bucket=self._bucket, Key=name)
            except self._client.exceptions.ClientError as error:
                if _code(error) in _ABSENT:
                    return None
                raise
            return bytes(found["Body"].read())

        return self._try(key, read)

    def blocks(self, key: str, size: int, block: int = 1 << 23) -> Iterator[bytes]:
        """The content in pieces, each fetched by a request of its own."""
        name = self._prefix + key
        for start in range(0, size, block):
            span = f"bytes={start}-{min(start + block, size) - 1}"

            def read(span: str = span) -> bytes:
                found = self._client.get_object(Bucket=self._bucket, Key=name, Range=span)
                return bytes(found["Body"].read())

            yield self._try(key, read)

    def download(self, key: str, size: int, path: Path) -> None:
        """Into a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for block in self.blocks(key, size):
                file.write(block)

    def sizes(self, below: str = "") -> dict[str, int]:
        """Keys that begin so, with their sizes."""

        def read() -> dict[str, int]:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + below
            )
            return {
                entry["Key"].removeprefix(self._prefix): entry["Size"]
                for page in pages
                for entry in page.get("Contents", [])
            }

        return self._try(below, read)

    def delete(self, key: str) -> None:
        """Nothing happens where there is none."""
        name = self._prefix + key
        self._try(key, lambda: self._client.delete_object(Bucket=self._bucket, Key=name))

    def _try(self, key: str, call: Callable[[], Result]) -> Result:
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        pause = self._timing.pause_s
        for attempt in range(1, self._timing.attempts + 1):
            try:
                return call()
            except NoCredentialsError:
                raise StorageError(
                    self.url,
                    "cannot be reached without credentials",
                    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                ) from None
            except FileNotFoundError:
                raise
            except (BotoCoreError, ClientError, S3UploadFailedError, OSError) as error:
                why = _why(error)
                if why in _DENIED or why == "NoSuchBucket":
                    raise StorageError(
                        self.url, f"refuses ({why})", "write a bucket that these credentials reach"
                    ) from None
                if attempt == self._timing.attempts:
                    raise StorageError(
                        f"{self.url}/{key}",
                        f"cannot be reached ({why}, {attempt} attempts)",
                        "try again when it answers; nothing was lost here",
                    ) from None
            time.sleep(pause)
            pause *= 2
        raise AssertionError("an attempt returns or raises")


def _client(timing: Timing) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise ConfigError(
            "storage=s3://...", "needs boto3, which is not installed", "pip install raytune-ft[s3]"
        ) from None
    # Tried again here and nowhere below, so that there is one bound.
    once = {"total_max_attempts": 1, "mode": "standard"}
    config = Config(
        connect_timeout=timing.connect_s,
        read_timeout=timing.read_s,
        retries=once,
        max_pool_connections=16,
    )
    return boto3.session.Session().client("s3", config=config)


def _code(error: Any) -> str:
    response = getattr(error, "response", None)  # None of a connection that broke
    return str(response.get("Error", {}).get("Code", "")) if response else ""


def _why(error: BaseException) -> str:
    """A code or the name of an exception: texts may hold addresses with secrets in them."""
    cause = error.__context__ if type(error).__name__ == "S3UploadFailedError" else error
    return _code(cause) or type(cause).__name__
