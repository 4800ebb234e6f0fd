"""A run whose storage is an object store: a local directory that a thread copies there.

Object stores have no append, no rename and no SQLite, so the run is written to a local directory as
always. The thread copies what has changed: metrics, checkpoints, each committed by its manifest,
then the files that refer to them. `mirror.json` says which copy is the newest: a resume on another
machine fetches the run first, and the earlier driver then refuses to go on copying.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raytune_ft.background import repeated
from raytune_ft.bucket import Bucket, Timing
from raytune_ft.checkpoints.s3 import RemoteCheckpoints
from raytune_ft.checkpoints.store import CheckpointStore
from raytune_ft.config.explain import shown_value
from raytune_ft.errors import CheckpointError, StorageError
from raytune_ft.files import below, write_text_atomic
from raytune_ft.layout import (
    CHECKPOINTS,
    CONFIG,
    LOCK,
    MANIFEST,
    METRICS,
    MIRROR_OWNER,
    RESULT,
    STEP_NAME,
    free_path,
)
from raytune_ft.records import Tell

INTERVAL_S = 10.0
_LATEST = (RESULT, CONFIG)  # copied last, since they refer to the others


class Mirror:
    """One run or sweep, in its local directory and in the bucket."""

    def __init__(self, bucket: Bucket, run: Path, tell: Tell) -> None:
        self.bucket, self.run, self.name = bucket, run, run.name
        self._tell = tell
        self._seen: dict[str, tuple[int, int]] = {}
        self._owner = uuid.uuid4().hex
        self._claimed = self._resumed = False

    def begin(self, resume: bool) -> None:
        """Make the local directory the newest copy.

        Raises:
            StorageError: the bucket holds a run of that name and `resume` is false; or the store
                does not answer.
        """
        there = self.bucket.get(f"{self.name}/{CONFIG}") is not None
        if there and not resume:
            if not self._has_begun():  # its driver was killed before anything was measured
                self._delete()
                return
            raise StorageError(
                f"run {self.name}",
                f"exists in {self.bucket.url}, and names are used once",
                "write --resume to continue it, or another name",
            )
        self._resumed = there
        owner = self.bucket.get(f"{self.name}/{MIRROR_OWNER}")
        here = self.run / MIRROR_OWNER
        if there and not (here.is_file() and here.read_bytes() == owner):
            self._fetch()

    def sync(self) -> None:
        """Copy what is new, then delete there what retention has deleted here.

        Raises:
            StorageError: the store does not answer, or another driver has taken the run over;
                nothing is half-committed.
        """
        if not (self.run / CONFIG).is_file():  # undone after a mistake, or not begun
            if self._claimed and not self._resumed:
                self._delete()
            return
        self._claim()
        folders = sorted(self.run.rglob(CHECKPOINTS))
        remotes = [(folder, self._remote(folder)) for folder in folders if folder.is_dir()]
        checkpoints = [
            (remote, path)
            for folder, remote in remotes
            for path, _ in CheckpointStore(folder).list()
        ]
        # A resume elsewhere cuts metrics back to its checkpoint, so they must reach as far.
        for path in sorted(self.run.rglob(METRICS)):
            self._upload_file(path)
        for remote, path in checkpoints:
            self._upload_checkpoint(remote, path)
        for path in self._files():
            self._upload_file(path)
        for folder, remote in remotes:
            kept = [path.name for path, _ in CheckpointStore(folder).list()]
            if kept:
                for name in set(remote.names()) - set(kept):
                    remote.delete(name)
                remote.clear(keep=kept)
        (self.run / MIRROR_OWNER).touch()

    def _has_begun(self) -> bool:
        """Whether the bucket has anything that was measured, or a result."""
        names = {key.rpartition("/")[2] for key in self.bucket.sizes(f"{self.name}/")}
        return bool(names & {METRICS, MANIFEST, RESULT})

    def _delete(self) -> None:
        for key in self.bucket.sizes(f"{self.name}/"):
            self.bucket.delete(key)

    def _claim(self) -> None:
        """StorageError where a later driver has taken the run over."""
        key = f"{self.name}/{MIRROR_OWNER}"
        if self._claimed and self.bucket.get(key) != self._owner.encode():
            raise StorageError(
                f"{self.bucket.url}/{self.name}",
                "was taken over by another driver",
                f"let that driver go on; the work of this one is in {self.run}",
            )
        if not self._claimed:
            self.bucket.put(key, self._owner.encode())
            write_text_atomic(self.run / MIRROR_OWNER, self._owner)
            self._claimed = True

    def _remote(self, folder: Path) -> RemoteCheckpoints:
        key = folder.relative_to(self.run).as_posix()
        return RemoteCheckpoints(self.bucket, f"{self.name}/{key}")

    def _upload_checkpoint(self, remote: RemoteCheckpoints, path: Path) -> None:
        key = path.relative_to(self.run).as_posix()
        try:
            stat = (path / MANIFEST).stat()
            mark = stat.st_mtime_ns, stat.st_size
            if self._seen.get(key) != mark:
                remote.upload(path)
                self._seen[key] = mark
        except FileNotFoundError:  # retention was faster; nothing was committed
            return
        except ValueError as error:
            self._tell(f"{path.name} is not copied: {error}")
            self._seen[key] = mark

    def _files(self) -> list[Path]:
        """All files but checkpoints, locks and unfinished ones; those that refer to others last.

        Links are skipped: a copy would take a file from elsewhere into the bucket.
        """
        found = [
            path
            for path in self.run.rglob("*")
            if path.is_file()
            and not path.is_symlink()
            and path.name != MIRROR_OWNER
            and not any(
                part.startswith(".") or STEP_NAME.fullmatch(part)
                for part in path.relative_to(self.run).parts
            )
        ]
        return sorted(found, key=lambda path: (path.name in _LATEST, path))

    def _upload_file(self, path: Path) -> None:
        key = path.relative_to(self.run).as_posix()
        if path.name.endswith(("-wal", "-shm", "-journal")):
            return
        try:
            stat = path.stat()
            mark = stat.st_mtime_ns, stat.st_size
            if self._seen.get(key) == mark:
                return
            if path.suffix == ".db":
                self._upload_database(path, f"{self.name}/{key}")
            else:
                self.bucket.upload(path, f"{self.name}/{key}")
            self._seen[key] = mark
        except FileNotFoundError:  # replaced or deleted meanwhile
            return

    def _upload_database(self, path: Path, key: str) -> None:
        """A consistent copy, also while the database is being written."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            source, target = sqlite3.connect(path), sqlite3.connect(copy)
            try:
                source.backup(target)
            finally:
                source.close()
                target.close()
            self.bucket.upload(copy, key)

    def _fetch(self) -> None:
        """Download the run into a hidden directory, whose content then replaces that of the local
        one, but for its lock. An older local copy is kept beside it.
        """
        self._tell(f"fetching {self.bucket.url}/{self.name}")
        fetched = self.run.with_name(f".{self.name}.fetched")
        # All keys are checked before the first download. Consoles of stores mark folders with keys
        # that end in a slash and hold nothing.
        keys = [key for key in self.bucket.sizes(f"{self.name}/") if not key.endswith("/")]
        targets = {key: self._target(fetched, key) for key in keys}
        shutil.rmtree(fetched, ignore_errors=True)
        fetched.mkdir(parents=True)
        checkpoints: set[str] = set()
        for key, target in targets.items():
            parts = target.relative_to(fetched).parts
            step = next((n for n, part in enumerate(parts) if STEP_NAME.fullmatch(part)), None)
            if step is not None:
                checkpoints.add("/".join(parts[:step]))
            else:
                self.bucket.download(key, target)
        for folder in sorted(checkpoints):
            remote = RemoteCheckpoints(self.bucket, f"{self.name}/{folder}")
            (fetched / folder).mkdir(parents=True, exist_ok=True)
            for name in remote.names():
                try:
                    remote.fetch(name, fetched / folder)
                except CheckpointError as error:
                    self._tell(f"checkpoint {name} is skipped: {error}")
        self.run.mkdir(parents=True, exist_ok=True)
        if older := [path for path in self.run.iterdir() if path.name != LOCK]:
            aside = free_path(self.run, ".older-")
            _move(older, aside)
            self._tell(f"the older local copy is kept as {aside}")
        _move(fetched.iterdir(), self.run)
        fetched.rmdir()

    def _target(self, fetched: Path, key: str) -> Path:
        """The local path of a key; StorageError for a key that leads out of the run's directory."""
        try:
            return below(fetched, key.removeprefix(f"{self.name}/"))
        except ValueError:
            raise StorageError(
                f"{self.bucket.url}/{shown_value(key)}",
                "is an object whose key leads out of the run's directory",
                "delete it, and find out who wrote it; nothing was fetched",
            ) from None


def _move(paths: Iterable[Path], target: Path) -> None:
    """The owner last: a run whose move was broken off has none, and is fetched again."""
    target.mkdir(exist_ok=True)
    for path in sorted(paths, key=lambda path: path.name == MIRROR_OWNER):
        path.rename(target / path.name)


@contextmanager
def mirrored(
    url: str | None,
    run: Path,
    resume: bool,
    tell: Tell,
    interval_s: float = INTERVAL_S,
    timing: Timing | None = None,
) -> Iterator[None]:
    """Inside, a thread copies the run in the local directory `run` to `url`; not for a None.

    A store that does not answer for a while does not delay the run. One that does not answer at the
    end is an error; the local copy is complete.

    Raises:
        StorageError: see `Mirror.begin`; or the last copy failed.
        ConfigError: the client is not installed.
    """
    if url is None:
        yield
        return
    mirror = Mirror(Bucket(url, timing), run, tell)
    mirror.begin(resume)
    silent = False

    def copy() -> None:
        nonlocal silent
        try:
            mirror.sync()
            silent = False
        except (StorageError, OSError) as error:
            if not silent:
                tell(f"not copied for now: {error}")
            silent = True

    try:
        with repeated(copy, interval_s, "mirror"):
            yield
    except BaseException:
        try:
            mirror.sync()
        except (StorageError, OSError) as error:
            tell(f"not copied: {error}")
        raise
    mirror.sync()
