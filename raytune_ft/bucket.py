"""Objects below `s3://bucket/prefix`; every request is bounded in time and repeated a few times.

Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL), and are never part of a message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from raytune_ft.config.paths import OBJECT_STORE
from raytune_ft.errors import ConfigError, StorageError

_DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403")
_ABSENT = ("NoSuchKey", "404", "NotFound")


@dataclass(frozen=True)
class Timing:
    """How long a request may take, and how often botocore's `standard` retries make it.

    Their pauses begin at 0.05 s and double, so that 8 attempts outlast a few seconds without a
    server.
    """

    attempts: int = 8
    connect_s: float = 5.0
    read_s: float = 20.0


class _Hashed:
    """A file to write to of which only the hash is kept."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        return len(block)


class Bucket:
    """The objects below a URL, by keys relative to it."""

    def __init__(self, url: str, timing: Timing | None = None) -> None:
        """
        Raises:
            ConfigError: it is not the URL of a bucket, or the client is not installed.
        """
        bucket, _, prefix = url.removeprefix(OBJECT_STORE).strip("/").partition("/")
        self.url = f"{OBJECT_STORE}{bucket}/{prefix}".rstrip("/")
        if not url.startswith(OBJECT_STORE) or not bucket or "@" in bucket:
            raise ConfigError(
                f"storage={url.rsplit('@', 1)[-1]}",
                "is not the URL of a bucket",
                "write s3://bucket/prefix, and credentials into the environment",
            )
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._timing = timing or Timing()
        self._client = _client(self._timing)

    def put(self, key: str, data: bytes) -> None:
        """One object, by one request: readers see the old one or the new one."""
        with self._explained(key):
            self._client.put_object(
                Bucket=self._bucket, Key=self._prefix + key, Body=data, ChecksumAlgorithm="CRC32"
            )

    def upload(self, path: Path, key: str) -> None:
        """A file of any size; nothing is visible until its last part has arrived.

        Raises:
            FileNotFoundError: the file has gone.
        """
        with self._explained(key):
            self._client.upload_file(str(path), self._bucket, self._prefix + key)

    def get(self, key: str) -> bytes | None:
        """The content, None where there is none."""
        content = BytesIO()
        with self._explained(key):
            try:
                self._client.download_fileobj(self._bucket, self._prefix + key, content)
            except self._client.exceptions.ClientError as error:
                if _code(error) not in _ABSENT:
                    raise
                # The same code stands for a missing bucket; a listing tells them apart.
                self._client.list_objects_v2(Bucket=self._bucket, MaxKeys=1)
                return None
        return content.getvalue()

    def sha256(self, key: str) -> str:
        """Of the content, in hexadecimal; nothing is kept on the disk."""
        content = _Hashed()
        with self._explained(key):
            self._client.download_fileobj(self._bucket, self._prefix + key, content)
        return content.digest.hexdigest()

    def download(self, key: str, path: Path) -> None:
        """Into a file, which appears when it is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained(key):
            self._client.download_file(self._bucket, self._prefix + key, str(path))

    def sizes(self, below: str = "") -> dict[str, int]:
        """Keys that begin with `below`, with their sizes in bytes."""
        return {key: size for key, (size, _) in self.objects(below).items()}

    def objects(self, below: str = "") -> dict[str, tuple[int, str]]:
        """Keys that begin with `below`, with their sizes in bytes and their ETags, which differ
        where the content does.
        """
        with self._explained(below):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + below
            )
            return {
                entry["Key"].removeprefix(self._prefix): (entry["Size"], entry["ETag"])
                for page in pages
                for entry in page.get("Contents", [])
            }

    def delete(self, key: str) -> None:
        """Nothing happens where there is none."""
        with self._explained(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turns the error that the client raises after its last attempt into a StorageError."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
        from s3transfer.exceptions import RetriesExceededError

        try:
            yield
        except NoCredentialsError:
            raise StorageError(
                self.url,
                "cannot be reached without credentials",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            ) from None
        except FileNotFoundError:
            raise
        except (BotoCoreError, ClientError, Boto3Error, RetriesExceededError, OSError) as error:
            why = _why(error)
            if why in _DENIED or why == "NoSuchBucket":
                raise StorageError(
                    self.url, f"refuses ({why})", "write a bucket that these credentials reach"
                ) from None
            raise StorageError(
                f"{self.url}/{key}",
                f"cannot be reached ({why}, up to {self._timing.attempts} attempts)",
                "try again when the store answers; nothing was lost here",
            ) from None


def _client(timing: Timing) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise ConfigError(
            "storage=s3://...", "needs boto3, which is not installed", "pip install raytune-ft[s3]"
        ) from None
    config = Config(
        connect_timeout=timing.connect_s,
        read_timeout=timing.read_s,
        retries={"total_max_attempts": timing.attempts, "mode": "standard"},
        max_pool_connections=16,
    )
    return boto3.session.Session().client("s3", config=config)


def _code(error: Any) -> str:
    response = getattr(error, "response", None)  # None of a connection that broke
    return str(response.get("Error", {}).get("Code", "")) if response else ""


def _why(error: BaseException) -> str:
    """The error's code or the exception's name; its text may hold an address with secrets."""
    cause = getattr(error, "last_exception", None)  # of a download that was given up
    if type(error).__name__ == "S3UploadFailedError":
        cause = error.__context__
    return _code(cause or error) or type(cause or error).__name__
