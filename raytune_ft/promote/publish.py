"""`promoted/` appears by one rename or not at all; an earlier one is kept beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from raytune_ft.checkpoints.manifest import fsync_folders
from raytune_ft.errors import StorageError
from raytune_ft.files import fsync
from raytune_ft.rundir import PROMOTED

MODEL, EVALUATION, CARD, SCORES = "model", "evaluation.json", "README.md", "scores.jsonl"
ADAPTER = "adapter"
UNFINISHED = ".promoted.new"
_LOCK = ".promoted.lock"


def looks_so_far(directory: Path) -> int:
    """How often the held-out split of this run or sweep has been measured."""
    counts = [0]
    for path in directory.glob(f"{PROMOTED}*/{EVALUATION}"):
        counts.append(int(json.loads(path.read_text(encoding="utf-8")).get("looks", 1)))
    return max(counts)


def publish(unfinished: Path, target: Path, tell: Callable[[str], None]) -> None:
    """Move `unfinished` to `target`, whose earlier content becomes `promoted-1`, and so on."""
    fsync_folders(unfinished)
    if target.exists():
        number = 1
        while (kept := target.with_name(f"{PROMOTED}-{number}")).exists():
            number += 1
        target.rename(kept)
        tell(f"the earlier {PROMOTED} is kept as {kept.name}")
    unfinished.rename(target)
    fsync(target.parent)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Path) -> None:
    """Tokenizer and chat template; and the end token that training used ends generation too."""
    tokenizer.save_pretrained(str(model))
    path = model / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    written = settings.get("eos_token_id")
    known = written if isinstance(written, list) else [written] if written is not None else []
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id in known:
        return
    ends = [*known, tokenizer.eos_token_id]
    settings["eos_token_id"] = ends if known else tokenizer.eos_token_id
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One promotion at a time; the kernel gives the lock up when its holder dies."""
    lock = FileLock(directory / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StorageError(
            str(directory), "is being promoted by another process", "wait for it to end"
        ) from None
    except OSError as error:
        raise StorageError(
            str(directory), f"cannot be written ({error.strerror})", "make it writable"
        ) from error
    try:
        yield
    finally:
        lock.release()
