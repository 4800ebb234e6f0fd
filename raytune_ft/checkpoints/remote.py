"""Checkpoints on an object store, which has no rename: the manifest's PUT is the commit.

    NAME/checkpoints/step-000120/model.safetensors, ...    uploaded first
    NAME/checkpoints/step-000120/manifest.json             last; without it nothing is there

A checkpoint disappears by its manifest, before its first file is deleted. So whatever fails, and
whenever, a listing shows whole checkpoints; files without a manifest are rubbish of an attempt.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from raytune_ft.checkpoints.manifest import MANIFEST, STEP_NAME, parse_manifest
from raytune_ft.checkpoints.s3 import Bucket
from raytune_ft.errors import CheckpointError
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
        return sorted(found, key=lambda name: int(name.removeprefix("step-")))

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
