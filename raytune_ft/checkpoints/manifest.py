"""`manifest.json`: what a checkpoint consists of, written last and checked first."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raytune_ft.errors import CheckpointError
from raytune_ft.files import flush_file, fsync, relative_parts, sha256_of
from raytune_ft.layout import MANIFEST, STEP_NAME
from raytune_ft.records import CheckpointManifest, FileRecord, to_json

FORMAT = 1
_BLANK = "0" * 64


def write_manifest(path: Path, manifest: CheckpointManifest) -> None:
    """The manifest carries its own sha256, over its text with 64 zeros in that place."""
    fields = json.loads(to_json(manifest)) | {"manifest_sha256": _BLANK}
    text = to_json(fields, indent=2) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    with path.open("w", encoding="utf-8") as file:
        file.write(text.replace(f'"{_BLANK}"', f'"{digest}"'))
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(path: Path) -> CheckpointManifest:
    with _readable(path):
        raw = path.read_bytes()
    return parse_manifest(raw, str(path))


def parse_manifest(raw: bytes, path: str) -> CheckpointManifest:
    """
    Raises:
        CheckpointError: it is damaged; `path` is for the message.
    """
    try:
        fields = json.loads(raw)
        declared = fields.pop("manifest_sha256")
        blanked = raw.replace(f'"{declared}"'.encode(), f'"{_BLANK}"'.encode(), 1)
        if hashlib.sha256(blanked).hexdigest() != declared:
            raise ValueError("its sha256 is not the one that it names")
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']} is not {FORMAT}, which this version reads")
        files = tuple(FileRecord(**record) for record in fields.pop("files"))
        for file in files:
            relative_parts(file.path)
        return CheckpointManifest(files=files, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as cause:
        raise CheckpointError(f"{path} is damaged: {cause}") from cause


def check_sizes(path: Path) -> CheckpointManifest:
    """The manifest, if it is sound and every file that it lists has its size.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    manifest = _read_manifest(path / MANIFEST)
    if (match := STEP_NAME.fullmatch(path.name)) and int(match[1]) != manifest.step:
        raise CheckpointError(f"{path / MANIFEST} is of step {manifest.step}")
    for record in manifest.files:
        with _readable(path / record.path):
            size = (path / record.path).stat().st_size
        if size != record.bytes:
            raise CheckpointError(
                f"{path / record.path} is damaged: {size} bytes, the manifest says {record.bytes}"
            )
    return manifest


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as cause:
        raise CheckpointError(f"{path} is missing") from cause
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read: {cause.strerror}") from cause


def flush_files(root: Path) -> Iterator[FileRecord]:
    """`flush_file` of every file below `root`."""
    for path in sorted(file for file in root.rglob("*") if file.is_file()):
        yield flush_file(path, root)


def check_contents(path: Path, files: Iterable[FileRecord]) -> None:
    """Read these files.

    Raises:
        CheckpointError: names the file whose bytes are not those that were written.
    """
    for record in files:
        with _readable(path / record.path):
            found = sha256_of(path / record.path)
        if found != record.sha256:
            raise CheckpointError(
                f"{path / record.path} is damaged: sha256 {found[:12]}..., "
                f"the manifest says {record.sha256[:12]}..."
            )


def fsync_folders(root: Path) -> None:
    """Force the entries of `root` and of all folders below it to the disk, the deepest first."""
    inner = [path for path in root.rglob("*") if path.is_dir()]
    for folder in [*sorted(inner, key=lambda path: -len(path.parts)), root]:
        fsync(folder)
