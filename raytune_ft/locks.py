"""Locks of files: one process at a time; the kernel releases them when their holder dies."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from raytune_ft.errors import LockHeld, StorageError
from raytune_ft.records import Tell

LOOK_EVERY_S = 0.5
TELL_EVERY_S = 30.0
DRIVEN = "is driven by another process"
PROMOTING = "is being promoted by another process"
WAIT = "wait for it to end (--wait-lock 3m)"
_WITHOUT = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


@dataclass(frozen=True)
class Wait:
    """How long to wait for a lock that another process holds; None: not at all."""

    seconds: float | None = None
    tell: Tell = lambda line: None


AT_ONCE = Wait()


@contextmanager
def locked(path: Path, rule: str, remedy: str, wait: Wait = AT_ONCE) -> Iterator[None]:
    """Hold the lock `path`; `rule` and `remedy` are those of the error where another one does.

    Raises:
        StorageError: another process holds it, it cannot be written, or its file system has no
            locks that keep a second holder out.
        LockHeld: another process held it for as long as `wait` allows.
    """
    lock = _file_lock(path)
    deadline = time.monotonic() + (wait.seconds or 0.0)
    told_at: float | None = None
    while True:
        try:
            lock.acquire()
            break
        except Timeout:
            if wait.seconds is None:
                raise StorageError(str(path.parent), rule, remedy) from None
        except FileNotFoundError:  # a holder that undid a mistake removed the directory with it
            path.parent.mkdir(exist_ok=True)
            continue
        except OSError as error:
            raise _unusable(path, error) from None
        now = time.monotonic()
        if now >= deadline:
            raise LockHeld(f"{path.parent} {rule}, also after {wait.seconds:g} s of waiting")
        if told_at is None or now - told_at >= TELL_EVERY_S:
            told_at = now
            limit = f" {deadline - now:.0f} s at most" if deadline < math.inf else ""
            wait.tell(f"{path.parent} {rule}; waiting{limit}")
        time.sleep(min(LOOK_EVERY_S, deadline - now))
    try:
        _refuse_shared(path)
        yield
    finally:
        lock.release()


def _file_lock(path: Path) -> FileLock:
    # The library's other kind of lock, a file that a dead holder leaves behind, is not wanted.
    return FileLock(path, timeout=0, fallback_to_soft=False)


def _refuse_shared(path: Path) -> None:
    """StorageError where the lock `path`, which this process holds, can be taken once more."""
    second = _file_lock(path)
    try:
        second.acquire()
    except Timeout:
        return
    second.release()
    raise _without_locks(path, "two processes can hold one")


def _unusable(path: Path, error: OSError) -> StorageError:
    if error.errno in _WITHOUT:
        return _without_locks(path, str(error.strerror))
    rule = f"cannot be written ({error.strerror})"
    return StorageError(str(path.parent), rule, "write a directory that this user can write to")


def _without_locks(path: Path, reason: str) -> StorageError:
    return StorageError(
        str(path.parent),
        f"is on a file system without locks ({reason})",
        "mount it with locks (Lustre: -o flock), or write another storage",
    )
