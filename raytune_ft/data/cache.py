"""The folders of the token cache: named by content, written atomically, also by several writers."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from raytune_ft.data.formats import Encoder
from raytune_ft.errors import StorageError


def tokenizer_sha256(encoder: Encoder) -> str:
    """Hash of the files that the tokenizer saves, whatever its kind.

    tokenizer_config.json is left out, because it also holds how the tokenizer was loaded; the keys
    that tokens depend on are read from the object.
    """
    tokenizer = encoder.tokenizer
    facts = [encoder.prefix, encoder.eos, tokenizer.chat_template, tokenizer.special_tokens_map]
    digest = hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file() and file.name != "tokenizer_config.json":
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def keep_folder(target: Path, fill: Callable[[Path], None], is_sound: Callable[[], bool]) -> None:
    """Let `fill` write a folder, which becomes `target`, unless a sound one has appeared there.

    Raises:
        StorageError: the disk is full, or the folder is not writable.
    """
    try:
        _write(target, fill, is_sound)
    except OSError as error:
        remedy = "write a storage with room that this user may write"
        raise StorageError(str(target.parent), f"cannot hold tokens ({error})", remedy) from error


def _write(target: Path, fill: Callable[[Path], None], is_sound: Callable[[], bool]) -> None:
    """Write beside `target`, then rename: two processes may do so at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=".building-", ignore_cleanup_errors=True
    ) as name:
        folder = Path(name) / "data"
        folder.mkdir()
        fill(folder)
        while True:
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
            else:
                return
            if is_sound():
                return
            # Damaged: move it away first. Another process may already have done so.
            aside = target.with_name(f".damaged-{uuid.uuid4().hex}")
            with suppress(FileNotFoundError):
                target.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
