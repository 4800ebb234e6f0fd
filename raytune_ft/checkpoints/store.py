"""A folder of checkpoints in which everything that is visible is whole.

    root/step-000120/            a checkpoint; manifest.json lists every file with size and sha256
    root/.step-000120.<owner>.new   being written, or left by a process that died
    root/.step-000120.<owner>.old   being deleted

A checkpoint becomes visible by one rename, after its files, its manifest and its folders have
reached the disk; it disappears by one rename before its first file is deleted. So a crash at any
moment leaves whole checkpoints and hidden rubbish, which `retain` clears.

Later damage (a flipped bit, a truncated file) is found by `verify`, which every resume calls.
Damaged folders stay in place: a read error may be temporary, a person may want to look at them, and
a run that reaches the same step again replaces them.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from raytune_ft.checkpoints.manifest import (
    FORMAT,
    check_contents,
    check_sizes,
    fsync_folders,
    write_manifest,
)
from raytune_ft.errors import CheckpointError
from raytune_ft.files import fsync
from raytune_ft.layout import HIDDEN_STEP, MANIFEST, STEP_NAME, free_path, hidden_step, step_name
from raytune_ft.records import CheckpointManifest, FileRecord

_TOKEN = uuid.uuid4().hex[:8]  # tells this process from an earlier one with the same pid
_DAY_S = 24 * 3600
_LINUX = (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid"))


@dataclass(frozen=True)
class CheckpointFacts:
    """Fields of the manifest beside the step and the files; `retain` ranks by `metrics`."""

    examples: int
    config_sha256: str
    method: str
    eval_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of one run, usually `RUN_DIR/checkpoints`; created by the first commit."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def begin(self, step: int, facts: CheckpointFacts) -> Path | None:
        """An empty hidden folder for the files of `step-N`, to be given to `finish` or `drop`.

        None where a valid `step-N` of the same config exists, since a resumed run repeats steps;
        any other folder of that name is replaced.

        Raises:
            CheckpointError: it cannot be created.
        """
        target = self.root / step_name(step)
        if self._is_same(target, facts):
            return None
        folder = self._hidden(target.name, "new")
        with self.writing(step):
            folder.mkdir(parents=True)
        return folder

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Inside, what belongs to `step-N` is written.

        Raises:
            CheckpointError: it could not be, as on a full disk.
        """
        try:
            yield
        except (OSError, SafetensorError) as cause:
            target = self.root / step_name(step)
            raise CheckpointError(f"{target} could not be written: {cause}") from cause

    def finish(
        self, folder: Path, step: int, facts: CheckpointFacts, files: Iterable[FileRecord]
    ) -> Path:
        """Make `folder` visible as `step-N`; `files` are on the disk already.

        Raises:
            CheckpointError: it could not be; earlier checkpoints are untouched.
        """
        target = self.root / step_name(step)
        loss = {} if facts.eval_loss is None else {"eval_loss": facts.eval_loss}
        manifest = CheckpointManifest(
            step=step,
            examples=facts.examples,
            eval_loss=facts.eval_loss,
            config_sha256=facts.config_sha256,
            method=facts.method,
            files=tuple(sorted(files, key=lambda record: record.path)),
            format=FORMAT,
            versions=facts.versions,
            metrics=facts.metrics | loss,
        )
        with self.writing(step):
            write_manifest(folder / MANIFEST, manifest)
            fsync_folders(folder)
            self._publish(folder, target, facts)
        return target

    def drop(self, folder: Path) -> None:
        """Delete the folder that `begin` returned, if it still exists."""
        shutil.rmtree(folder, ignore_errors=True)

    def verify(self, path: Path, share: int = 0, shares: int = 1) -> CheckpointManifest:
        """Read every byte of a checkpoint; returns its manifest if every file is as it was written.

        With `shares` processes, this one reads files `share`, `share + shares`, and so on. Files
        that the manifest does not list are ignored.

        Raises:
            CheckpointError: names the file and what is wrong with it.
        """
        manifest = check_sizes(path)
        check_contents(path, manifest.files[share::shares])
        return manifest

    def list(self) -> Sequence[tuple[Path, CheckpointManifest]]:
        """Checkpoints by ascending step, whose manifest is sound and whose files have its sizes."""
        found = []
        for path in self.paths():
            try:
                found.append((path, check_sizes(path)))
            except CheckpointError:
                continue
        return found

    def retain(
        self,
        keep_last: int,
        keep_best: int,
        mode: Literal["min", "max"],
        protect: Collection[str] = (),
        metric: str = "eval_loss",
        keep_every_examples: int | None = None,
    ) -> Sequence[str]:
        """Delete all but the newest, the best by `metric`, milestones and the protected; names of
        the deleted.

        `protect` takes names or paths that end in one. A milestone is the first checkpoint at or
        past a multiple of `keep_every_examples`. Damaged folders are neither counted nor deleted.
        Hidden rubbish of dead processes is cleared too.
        """
        deleted = self.to_delete(keep_last, keep_best, mode, protect, metric, keep_every_examples)
        self.delete(deleted)
        return [path.name for path in deleted]

    def delete(self, paths: Iterable[Path]) -> None:
        """Each disappears by one rename. Hidden rubbish of dead processes is cleared too."""
        for path in paths:
            self._delete(path)
        self._clear_rubbish()

    def to_delete(
        self,
        keep_last: int,
        keep_best: int,
        mode: Literal["min", "max"],
        protect: Collection[str],
        metric: str,
        keep_every_examples: int | None,
    ) -> Sequence[Path]:
        """The checkpoints that `retain` would delete."""
        checkpoints = self.list()
        kept = {Path(name).name for name in protect}
        kept |= {path.name for path, _ in checkpoints[-max(keep_last, 1) :]}
        sign = 1.0 if mode == "min" else -1.0
        scored = [
            (sign * value, manifest.step, path.name)
            for path, manifest in checkpoints
            if (value := manifest.metrics.get(metric)) is not None
        ]
        kept |= {name for _, _, name in sorted(scored)[: max(keep_best, 1)]}
        if keep_every_examples is not None:
            milestones: dict[int, str] = {}
            for path, manifest in checkpoints:
                milestones.setdefault(manifest.examples // keep_every_examples, path.name)
            kept |= {name for multiple, name in milestones.items() if multiple}
        return [path for path, _ in checkpoints if path.name not in kept]

    def quarantine(self, path: Path) -> Path:
        """Rename a damaged checkpoint to `step-N.damaged-1` and so on; returns the new path."""
        aside = free_path(path, ".damaged-")
        path.rename(aside)
        fsync(self.root)
        return aside

    def paths(self) -> Sequence[Path]:
        """Folders of checkpoints by ascending step, sound or not."""
        if not self.root.is_dir():
            return []
        steps = [
            (int(match[1]), path)
            for path in self.root.iterdir()
            if (match := STEP_NAME.fullmatch(path.name)) and path.is_dir()
        ]
        return [path for _, path in sorted(steps)]

    def _is_same(self, target: Path, facts: CheckpointFacts) -> bool:
        """Whether `target` is whole and is what a commit of `facts` would write."""
        if not target.exists():
            return False
        try:
            manifest = self.verify(target)
        except CheckpointError as error:
            logging.getLogger(__name__).warning(f"checkpoint {target.name} is replaced: {error}")
            return False
        measured = facts.eval_loss is None or manifest.eval_loss is not None
        same_run = (manifest.config_sha256, manifest.examples, manifest.method) == (
            facts.config_sha256,
            facts.examples,
            facts.method,
        )
        return same_run and measured

    def _publish(self, temporary: Path, target: Path, facts: CheckpointFacts) -> None:
        if target.exists():
            self._delete(target)
        try:
            temporary.rename(target)
        except OSError as cause:
            # A worker that was presumed dead committed the same step a moment ago.
            if cause.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not self._is_same(
                target, facts
            ):
                raise
        fsync(self.root)

    def _delete(self, path: Path) -> None:
        rubbish = self._hidden(path.name, "old")
        path.rename(rubbish)
        fsync(self.root)
        shutil.rmtree(rubbish, ignore_errors=True)

    def _hidden(self, name: str, kind: Literal["new", "old"]) -> Path:
        owner = f"{machine()}.{os.getpid()}.{_TOKEN}{uuid.uuid4().hex[:8]}"
        return self.root / hidden_step(name, owner, kind)

    def _clear_rubbish(self) -> None:
        for path in self.root.glob(".step-*"):
            if (match := HIDDEN_STEP.fullmatch(path.name)) and _is_rubbish(path, match):
                shutil.rmtree(path, ignore_errors=True)


def machine() -> str:
    """Names where a process id is unique: the host's name, and a hash of its boot and its PID
    namespace, since pods on one host may share the name.
    """
    boot, namespace = _LINUX
    try:
        facts = f"{boot.read_text()} {namespace.readlink()}"
    except OSError:  # another system, or a sandbox that does not say
        facts = ""
    return f"{socket.gethostname()}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def _is_rubbish(path: Path, match: re.Match[str]) -> bool:
    """Whether no living process writes this hidden folder. One of another machine is rubbish after
    a day.
    """
    if match["kind"] == "old":
        return True
    if match["machine"] != machine():
        try:
            return time.time() - path.stat().st_mtime > _DAY_S
        except FileNotFoundError:
            return False
    pid = int(match["pid"])
    if pid == os.getpid():
        return not match["token"].startswith(_TOKEN)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
