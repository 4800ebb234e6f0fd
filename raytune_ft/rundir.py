"""A run's directory: created once, driven by one process at a time."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raytune_ft.config.environment import STORAGE_VARIABLE, expand_text
from raytune_ft.config.identity import check_resume
from raytune_ft.config.load import dump_yaml, load_config
from raytune_ft.config.paths import OBJECT_STORE
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError, InputError, StorageError
from raytune_ft.files import fsync, write_new, write_text_atomic
from raytune_ft.layout import (
    CHECKPOINTS,
    CONFIG,
    LOCK,
    METRICS,
    NOT_BEGUN,
    RESULT,
    UNFINISHED,
    cache_in,
)
from raytune_ft.locks import AT_ONCE, DRIVEN, WAIT, Wait, locked
from raytune_ft.records import Forecast

Resume = bool | Literal["auto"]
"""`auto` begins a run, or continues what its name began."""


@dataclass(frozen=True)
class Layout:
    """How a run is laid out on its workers, chosen from an estimate of their memory."""

    micro_tokens: int
    activation_checkpointing: Literal["none", "selective", "full"]
    forecast: Forecast | None = None

    def of(self, config: Config) -> Config:
        """The config with these in place of `auto`."""
        train, parallel = config.train, config.parallel
        if train.micro_tokens == "auto":
            train = train.model_copy(update={"micro_tokens": self.micro_tokens})
        if parallel.activation_checkpointing == "auto":
            policy = self.activation_checkpointing
            parallel = parallel.model_copy(update={"activation_checkpointing": policy})
        return config.model_copy(update={"train": train, "parallel": parallel})


@dataclass(frozen=True)
class RunSpec:
    """A run as its processes get it. Paths are absolute.

    The config is left out of its text, since Ray keeps that text, and every `${ENV_NAME}` is
    expanded in the config. `layouts` are those of a sweep's trials, by the name of their method;
    the config of a run has its own.
    """

    config: Config = field(repr=False)
    run_dir: Path
    data_dir: Path
    metric: str = "eval_loss"
    mode: str = "min"
    forecast: Forecast | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)


_REMEDY = "write a storage directory that this user can write to"


def run_path(config: Config) -> Path:
    """STORAGE/NAME of a resolved config; for an object store, its local copy."""
    storage = expand_text(config.storage, "storage")
    return (_live(storage) if storage.startswith(OBJECT_STORE) else Path(storage)) / config.name


def remote_url(config: Config) -> str | None:
    """The storage, where it is an s3:// URL; None for a directory."""
    storage = expand_text(config.storage, "storage")
    return storage if storage.startswith(OBJECT_STORE) else None


def _live(url: str) -> Path:
    """Below RAYTUNE_FT_STORAGE, or else in the cache directory of the user."""
    root = os.environ.get(STORAGE_VARIABLE) or "~/.cache/raytune_ft/s3"
    return Path(root).expanduser() / url.removeprefix(OBJECT_STORE).strip("/")


def cache_path(config: Config) -> Path:
    """Where the tokens of a resolved config are cached."""
    return cache_in(run_path(config).parent)


def probe_storage(storage: Path) -> None:
    """Makes the directory and writes, syncs and deletes a file; StorageError where that fails."""
    probe = storage / f".probe-{secrets.token_hex(8)}"
    try:
        storage.mkdir(parents=True, exist_ok=True)
        write_new(probe, b"probe")
        probe.unlink()
    except (OSError, ValueError) as error:
        raise _unwritable(storage, error) from None


@dataclass(frozen=True)
class OpenRun:
    """A run directory that this process drives; `saved` is the config that a resume continues."""

    path: Path
    saved: Config | None

    @property
    def has_measured(self) -> bool:
        """Whether this run or one of its trials has written metrics or a checkpoint."""
        return bool(_measured(self.path))

    @contextmanager
    def begun(self, config: Config) -> Iterator[None]:
        """The work itself: inside, `config.yaml` is this config and there is no `result.json`.

        `result.json` is deleted before `config.yaml` is replaced, so that a killed process never
        leaves the result of a smaller budget beside a larger one. An InputError before anything
        more was measured restores both files.
        """
        measured = _measured(self.path)
        kept = {name: _text(self.path / name) for name in (CONFIG, RESULT)}
        _remove(self.path / RESULT)
        write_text_atomic(self.path / CONFIG, dump_yaml(config))
        try:
            yield
        except InputError:
            if _measured(self.path) == measured:
                _remove(self.path / RESULT)  # written by the run that failed on this mistake
                for name, text in kept.items():  # config first, then result
                    if text is not None:
                        write_text_atomic(self.path / name, text)
            raise


@contextmanager
def open_run(
    config: Config,
    resume: Resume,
    wait: Wait = AT_ONCE,
    copied: Callable[[bool], AbstractContextManager[None]] = lambda resume: nullcontext(),
) -> Iterator[OpenRun]:
    """The run's directory, locked for as long as the context lasts, with `config.yaml` in it.

    A new run has its new config there; a resumed one keeps its earlier config until `begun`. What
    was created here is deleted when an InputError ends the context before anything was measured,
    so that a mistake does not use up the name. What a driver left that was killed before that is
    deleted when the name is used again. `copied` keeps a copy elsewhere while the lock is held.

    Raises:
        StorageError: the name exists (with `resume`: does not exist), another process drives the
            directory, or the storage cannot be written.
        LockHeld: another process drove it for as long as `wait` allows.
        ConfigError: a resume changes a key that it must keep.
    """
    path = run_path(config)
    ours = _is_ours(path)  # the lock would make any directory look so
    if remote_url(config) is None:  # else a copy of it may be there
        _saved(path, config, resume, ours)
    probe_storage(path.parent)
    made = _make(path)
    rule, remedy = DRIVEN, f"{WAIT}, or write another name"
    with (
        locked(path / LOCK, rule, remedy, wait),
        _removed_if_unused(path, made),
        copied(bool(resume)),
    ):
        saved = _saved(path, config, resume, ours)  # another driver may have been faster
        if saved is None:
            _empty(path)
            write_text_atomic(path / CONFIG, dump_yaml(config))
        try:
            yield OpenRun(path, saved)
        except InputError:
            if saved is None and not _measured(path):
                _empty(path)
            raise


def _remove(path: Path) -> None:
    """Also after a power cut, like `write_text_atomic`."""
    path.unlink(missing_ok=True)
    fsync(path.parent)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _make(path: Path) -> bool:
    """Creates the directory; False where it exists."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise _unwritable(path, error) from None
    return True


@contextmanager
def _removed_if_unused(path: Path, made: bool) -> Iterator[None]:
    """Removes a directory that was `made` here, if nothing but its lock is left in it."""
    try:
        yield
    finally:
        if made and _names(path) == [LOCK]:
            shutil.rmtree(path, ignore_errors=True)


def _empty(path: Path) -> None:
    """Deletes the content of a directory, except for its lock."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            entry.unlink(missing_ok=True)


def _saved(path: Path, config: Config, resume: Resume, ours: bool) -> Config | None:
    """The config of the run that is continued; None where one begins.

    Raises:
        StorageError: the name exists, or with `resume` does not.
        ConfigError: `config` changes a key that a resume must keep.
    """
    free = ours and _has_not_begun(path)
    if not resume and not free:
        raise StorageError(
            f"run {path.name}",
            f"exists in {path.parent}, and names are used once",
            "write --resume to continue it, or another name",
        )
    if not resume:
        return None
    if resume == "auto" and free and not _goes_on(path, config):
        return None
    if not (path / CONFIG).is_file():
        remedy = "write another name" if resume == "auto" else "leave --resume out to begin one"
        raise StorageError(str(path), "holds no run to resume", remedy)
    saved = load_config(path / CONFIG)
    check_resume(saved, config)
    return saved


def _goes_on(path: Path, config: Config) -> bool:
    """Whether a directory in which nothing was measured is that of the same run."""
    try:
        check_resume(load_config(path / CONFIG), config)
    except ConfigError:
        return False
    return True


def _is_ours(path: Path) -> bool:
    """Whether a driver made the directory, or may: it is empty or missing, or has a lock in it.

    A config.yaml alone may be somebody's own.
    """
    names = _names(path)
    return not names or LOCK in names


def _has_not_begun(path: Path) -> bool:
    """Whether there is nothing but what a driver leaves that measured nothing."""
    known = all(name in NOT_BEGUN or name.startswith(UNFINISHED) for name in _names(path))
    return known and not _measured(path) and (path.is_dir() or not path.exists())


def _names(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.iterdir()] if path.is_dir() else []
    except OSError as error:
        raise _unwritable(path, error) from None


def _measured(path: Path) -> frozenset[tuple[Path, int]]:
    """Metrics and checkpoints of the run and its trials, with sizes; they are never deleted."""
    metrics = {(file, file.stat().st_size) for file in path.rglob(METRICS)}
    return frozenset(metrics | {(step, 0) for step in path.rglob(f"{CHECKPOINTS}/step-*")})


def _unwritable(path: Path, error: OSError | ValueError) -> StorageError:
    reason = getattr(error, "strerror", None) or "it is not a path"
    return StorageError(str(path), f"cannot be written ({reason})", _REMEDY)
