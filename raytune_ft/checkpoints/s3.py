"""The checkpoints in a bucket."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from raytune_ft.bucket import Bucket
from raytune_ft.checkpoints.manifest import parse_manifest
from raytune_ft.errors import CheckpointError
from raytune_ft.files import below
from raytune_ft.layout import MANIFEST, STEP_NAME
from raytune_ft.records import CheckpointManifest


class RemoteCheckpoints:
    """The checkpoints below one key, such as `NAME/checkpoints`."""

    def __init__(self, bucket: Bucket, root: str) -> None:
        self.bucket, self.root = bucket, root.strip("/")

    def names(self) -> list[str]:
        """Names of committed checkpoints, by ascending step."""
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
        return parse_manifest(self._raw_manifest(name), self._url(name, MANIFEST))

    def _raw_manifest(self, name: str) -> bytes:
        raw = self.bucket.get(self._key(name, MANIFEST))
        if raw is None:
            raise CheckpointError(f"{self._url(name)} is missing")
        return raw

    def upload(self, folder: Path) -> None:
        """Copy a checkpoint from the local disk; one of that name with other content is replaced.

        Raises:
            FileNotFoundError: it was deleted during the upload; nothing is committed.
            StorageError: the store does not answer; nothing is committed.
            ValueError: a link would take a file of elsewhere along; nothing is uploaded.
        """
        raw = (folder / MANIFEST).read_bytes()
        manifest = parse_manifest(raw, str(folder / MANIFEST))
        paths = {record.path: below(folder, record.path) for record in manifest.files}
        before = self.bucket.get(self._key(folder.name, MANIFEST))
        if before == raw:
            return
        if before is not None:
            self.bucket.delete(self._key(folder.name, MANIFEST))
        for record in manifest.files:
            self.bucket.upload(paths[record.path], self._key(folder.name, record.path))
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
            found = self.bucket.sha256(key)
            if found != record.sha256:
                raise CheckpointError(
                    f"{url} is damaged: sha256 {found[:12]}..., "
                    f"the manifest says {record.sha256[:12]}..."
                )
        return manifest

    def fetch(self, name: str, target: Path) -> None:
        """Download to `target/name`, which appears by one rename; an existing one is kept.

        Raises:
            CheckpointError: there is no such checkpoint, or a file is missing.
        """
        raw = self._raw_manifest(name)
        final, folder = target / name, target / f".{name}.fetched"
        if final.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        held = self.bucket.sizes(self._key(name, ""))
        for record in parse_manifest(raw, self._url(name, MANIFEST)).files:
            key = self._key(name, record.path)
            if key not in held:
                raise CheckpointError(f"{self._url(name, record.path)} is missing")
            self.bucket.download(key, folder / record.path)
        (folder / MANIFEST).write_bytes(raw)
        folder.rename(final)

    def delete(self, name: str) -> None:
        """Delete the manifest first, so that no half of a checkpoint is ever visible."""
        self.bucket.delete(self._key(name, MANIFEST))
        for key in self.bucket.sizes(self._key(name, "")):
            self.bucket.delete(key)

    def quarantine(self, name: str) -> str:
        """Rename a damaged checkpoint's manifest, so that it is not listed; returns its URL."""
        raw = self.bucket.get(self._key(name, MANIFEST)) or b""
        key = self._key(name, f"damaged.{MANIFEST}")
        self.bucket.put(key, raw)
        self.bucket.delete(self._key(name, MANIFEST))
        return f"{self.bucket.url}/{key}"

    def clear(self, keep: Collection[str]) -> None:
        """Delete files of uploads that were never committed, except those of `keep`."""
        whole = set(self.names()) | set(keep)
        for key in self.bucket.sizes(self._key("")):
            name = key.removeprefix(self._key("")).split("/")[0]
            if STEP_NAME.fullmatch(name) and name not in whole and "/damaged." not in key:
                self.bucket.delete(key)

    def _key(self, *parts: str) -> str:
        return "/".join((self.root, *parts)) if self.root else "/".join(parts)

    def _url(self, *parts: str) -> str:
        return f"{self.bucket.url}/{self._key(*parts)}"
