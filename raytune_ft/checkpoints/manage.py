"""`raytune-ft checkpoints`: list, verify and prune checkpoints of a run, a sweep or a URL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raytune_ft.bucket import Bucket
from raytune_ft.checkpoints.manifest import check_sizes
from raytune_ft.checkpoints.s3 import RemoteCheckpoints
from raytune_ft.checkpoints.store import CheckpointStore
from raytune_ft.config.load import load_config
from raytune_ft.config.paths import OBJECT_STORE
from raytune_ft.errors import CheckpointError, StorageError
from raytune_ft.files import read_object
from raytune_ft.layout import (
    CHECKPOINTS,
    CONFIG,
    LOCK,
    PROMOTED,
    PROMOTION_LOCK,
    RESULT,
    STEP_NAME,
    TRIALS,
)
from raytune_ft.locks import DRIVEN, PROMOTING, locked
from raytune_ft.records import CheckpointManifest, Tell


def run_folders(directory: Path) -> list[Path]:
    """The runs of a directory: a run, a sweep with its trials, or a run's `checkpoints`."""
    if directory.name == CHECKPOINTS:
        return [directory.parent]
    trials = sorted(path for path in (directory / TRIALS).glob("*") if path.is_dir())
    return [directory, *trials]


def referred(directory: Path) -> set[Path]:
    """Checkpoints that the result or a promotion of a run, or of a sweep and its trials, names."""
    found: set[Path] = set()
    for run in run_folders(directory):
        for name in _named(read_object(run / RESULT)):
            found.add((run / CHECKPOINTS / name).resolve())
    top = directory.parent if directory.name == CHECKPOINTS else directory
    # Promotions name checkpoints by path. Runs may have moved, so only the last parts are compared.
    for manifest in top.glob(f"{PROMOTED}*/**/*.json"):
        for text in _texts(read_object(manifest)):
            parts = Path(text).parts
            if len(parts) > 1 and STEP_NAME.fullmatch(parts[-1]) and parts[-2] == CHECKPOINTS:
                run = top / TRIALS / parts[-3] if len(parts) > 3 and parts[-4] == TRIALS else top
                found.add((run / CHECKPOINTS / parts[-1]).resolve())
    return found


def sweep_of(run: Path) -> Path:
    """The sweep that a run is a trial of, or else the run: its files may name the checkpoints."""
    above = run.parent.parent
    return above if run.parent.name == TRIALS and (above / CONFIG).is_file() else run


def _named(result: Any) -> Iterator[str]:
    """The step folders that a result names anywhere: best, final or on a Pareto front."""
    for text in _texts(result):
        if STEP_NAME.fullmatch(Path(text).name):
            yield Path(text).name


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


@dataclass(frozen=True)
class Row:
    """One checkpoint; `error` says what is damaged, `referred` that some file names it."""

    run: str
    name: str
    manifest: CheckpointManifest | None
    referred: bool = False
    error: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.bytes for file in self.manifest.files) if self.manifest else 0


class Place(Protocol):
    """A folder of checkpoints, on a disk or in an object store."""

    def rows(self) -> list[Row]:
        """Each checkpoint by its manifest; on a disk, sizes of files are checked."""
        ...

    def verify(self, name: str) -> CheckpointManifest:
        """Reads every byte; CheckpointError names what is damaged."""
        ...

    def quarantine(self, name: str) -> str:
        """Moves a damaged checkpoint aside; returns where it went."""
        ...


@dataclass(frozen=True)
class _Local:
    run: Path
    label: str
    kept: frozenset[Path]

    def rows(self) -> list[Row]:
        found = []
        for path in CheckpointStore(self.run / CHECKPOINTS).paths():
            named = path.resolve() in self.kept
            try:
                found.append(Row(self.label, path.name, check_sizes(path), named))
            except CheckpointError as error:
                found.append(Row(self.label, path.name, None, named, str(error)))
        return found

    def verify(self, name: str) -> CheckpointManifest:
        return CheckpointStore(self.run / CHECKPOINTS).verify(self.run / CHECKPOINTS / name)

    def quarantine(self, name: str) -> str:
        store = CheckpointStore(self.run / CHECKPOINTS)
        return str(store.quarantine(self.run / CHECKPOINTS / name))


@dataclass(frozen=True)
class _Remote:
    store: RemoteCheckpoints
    label: str

    def rows(self) -> list[Row]:
        found = []
        for name in self.store.names():
            try:
                found.append(Row(self.label, name, self.store.manifest(name)))
            except CheckpointError as error:
                found.append(Row(self.label, name, None, error=str(error)))
        return found

    def verify(self, name: str) -> CheckpointManifest:
        return self.store.verify(name)

    def quarantine(self, name: str) -> str:
        return self.store.quarantine(name)


def places(where: str) -> list[Place]:
    """The folders of checkpoints below a directory or an s3:// URL.

    Raises:
        StorageError: there is no such directory, or no checkpoint in it.
    """
    if where.startswith(OBJECT_STORE):
        bucket = Bucket(where)
        roots = {
            key.split(f"{CHECKPOINTS}/")[0] for key in bucket.sizes() if f"{CHECKPOINTS}/" in key
        }
        found: list[Place] = [
            _Remote(RemoteCheckpoints(bucket, f"{root}{CHECKPOINTS}"), root.rstrip("/") or ".")
            for root in sorted(roots)
        ]
    else:
        directory = Path(where).absolute()
        found = [
            _Local(run, _label(run, directory), frozenset(_kept(run)))
            for run in run_folders(directory)
            if (run / CHECKPOINTS).is_dir()
        ]
    if not found:
        raise StorageError(
            where, "holds no checkpoints", "write the directory of a run, a sweep or an s3:// URL"
        )
    return found


def listed(where: str) -> list[Row]:
    """All checkpoints, ordered by run and step."""
    return [row for place in places(where) for row in place.rows()]


def verified(where: str, tell: Tell) -> list[Row]:
    """Read every byte of every checkpoint; damaged ones are moved aside and named.

    Raises:
        StorageError: a run is being driven or promoted, which replaces or reads checkpoints.
    """
    found = []
    with _idle(where):
        for place in places(where):
            for row in place.rows():
                try:
                    place.verify(row.name)
                    found.append(row)
                except CheckpointError as error:
                    tell(f"{error}; moved to {place.quarantine(row.name)}")
                    found.append(Row(row.run, row.name, row.manifest, row.referred, str(error)))
    return found


def pruned(
    where: str, keep_last: int | None, keep_best: int | None, dry_run: bool, tell: Tell
) -> list[str]:
    """Delete checkpoints by the rules of each run's config; returns the paths of the deleted.

    `keep_last` and `keep_best` override the config. Checkpoints that a result, a merge or a
    promotion names are always kept. Damaged ones are moved aside.

    Raises:
        StorageError: a run is being driven or promoted, or the directory is a URL.
    """
    if where.startswith(OBJECT_STORE):
        raise StorageError(
            where, "is a copy of a run's local directory", "prune that directory and resume the run"
        )
    deleted = []
    with _idle(where):
        for run in run_folders(Path(where).absolute()):
            if not (run / CHECKPOINTS).is_dir() or not (run / CONFIG).is_file():
                continue
            config = load_config(run / CONFIG)
            above = sweep_of(run)
            search = (load_config(above / CONFIG) if above != run else config).search
            store = CheckpointStore(run / CHECKPOINTS)
            for row in _Local(run, run.name, frozenset()).rows():
                if row.error and not dry_run:
                    tell(f"{row.error}; moved to {store.quarantine(run / CHECKPOINTS / row.name)}")
            settings = config.checkpoint
            chosen = store.to_delete(
                keep_last or settings.keep_last,
                keep_best or settings.keep_best,
                search.modes[0] if search else "min",
                [path.name for path in _kept(run)],
                search.metrics[0] if search else "eval_loss",
                settings.keep_every_examples,
            )
            if not dry_run:
                store.delete(chosen)
            deleted += [str(path) for path in chosen]
    return deleted


def _kept(run: Path) -> set[Path]:
    folder = (run / CHECKPOINTS).resolve()
    return {path for path in referred(run) | referred(sweep_of(run)) if path.parent == folder}


def _label(run: Path, directory: Path) -> str:
    return (
        run.name
        if run == directory or not run.is_relative_to(directory)
        else str(run.relative_to(directory))
    )


@contextmanager
def _idle(where: str) -> Iterator[None]:
    """Nobody else drives or promotes the runs there, until it is left."""
    with ExitStack() as held:
        if not where.startswith(OBJECT_STORE):
            for run in sorted({sweep_of(run) for run in run_folders(Path(where).absolute())}):
                for name, rule in ((LOCK, DRIVEN), (PROMOTION_LOCK, PROMOTING)):
                    if (run / name).exists():
                        held.enter_context(locked(run / name, rule, "wait for it to end"))
        yield
