"""A folder of tokens: written as a whole, opened by all workers, and what is derived from one."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_ft.data.arrays import Indices
from raytune_ft.data.report import DataReport
from raytune_ft.data.split import Column, TokenizedSplit, length_range
from raytune_ft.errors import RunFailed, StorageError
from raytune_ft.files import sha256_of
from raytune_ft.layout import (
    BASE_LOSS,
    DATA_REPORT,
    TEACHER_LOGITS,
    partners_name,
    prompts_file,
    reference_file,
    rows_file,
)

REFERENCE = "reference"
"""The label column of the log-probabilities under the reference."""


@dataclass(frozen=True)
class PreparedData:
    """The splits of a run, memory-mapped from `path`.

    `base_loss` is [n]: the loss of each training example under the model before training, if it was
    measured (see `with_base_loss`). `teacher_logits` is [label tokens of train, vocabulary], if
    they are kept (see `with_teacher_logits`).
    """

    train: TokenizedSplit
    validation: TokenizedSplit
    test: TokenizedSplit | None
    report: DataReport
    path: Path
    base_loss: Column | None = None
    teacher_logits: npt.NDArray[Any] | None = None

    @property
    def splits(self) -> tuple[TokenizedSplit, ...]:
        """Those that there are."""
        return tuple(s for s in (self.train, self.validation, self.test) if s is not None)

    def rows(self, name: str) -> Indices:
        """[n], for each example of a split the number of its row, from 0, among all rows of the
        sources that the split is read from, in their order.

        Raises:
            RunFailed: their file cannot be read.
        """
        return _mapped(self.path / rows_file(name), len(self.all_splits[name]))

    @property
    def extent(self) -> tuple[int, int]:
        """The lengths of the shortest and of the longest sequence."""
        ranges = [length_range(split.part_offsets) for split in self.all_splits.values()]
        return min(shortest for shortest, _ in ranges), max(longest for _, longest in ranges)

    @property
    def widest(self) -> int:
        """The tokens of the longest example, whose sequences share a row where rows are packed."""
        return max(length_range(split.offsets)[1] for split in self.all_splits.values())

    @property
    def all_splits(self) -> dict[str, TokenizedSplit]:
        """All splits by name, and the partners of each."""
        own = {name: getattr(self, name) for name in self.report.splits}
        beside = {partners_name(name): split.partners for name, split in own.items()}
        return own | {name: split for name, split in beside.items() if split is not None}


def open_prepared(path: Path) -> PreparedData:
    """Map what `prepare_data` left at `path`; cheap enough for every worker.

    Raises:
        RunFailed: a file is missing, cut short, or not the one that the report describes.
    """
    try:
        report = DataReport.from_json((path / DATA_REPORT).read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFailed(f"{path / DATA_REPORT} cannot be read as a data report: {error}") from error
    splits = {
        name: replace(TokenizedSplit.open(path / f"{name}.arrow"), sources=report.names)
        for name in report.splits
    }
    for name in splits:
        own = path / f"{partners_name(name)}.arrow"
        if own.is_file():
            partners = _with_reference(path, partners_name(name), TokenizedSplit.open(own), report)
            splits[name] = replace(splits[name], partners=partners)
        splits[name] = _with_reference(path, name, splits[name], report)
    for name, split in splits.items():
        written = report.splits[name]
        if (len(split), len(split.input_ids)) != (written.examples, written.tokens):
            raise RunFailed(f"{path / name}.arrow is not the one that its report describes")
    if not {"train", "validation"} <= splits.keys():
        raise RunFailed(f"{path / DATA_REPORT} lacks a train or a validation split")
    return PreparedData(
        splits["train"],
        splits["validation"],
        splits.get("test"),
        report,
        path,
        None if report.base_loss is None else _mapped(path / BASE_LOSS, len(splits["train"])),
        None
        if report.teacher_logits is None
        else _mapped(path / TEACHER_LOGITS, int(splits["train"].label_counts.sum())),
    )


def _with_reference(
    path: Path, name: str, split: TokenizedSplit, report: DataReport
) -> TokenizedSplit:
    """The split with the log-probabilities of its label tokens under the reference, where known."""
    if name not in report.reference_files:
        return split
    logps_N = _mapped(path / reference_file(name), int(split.part_labels[-1]))
    return replace(split, label_columns={REFERENCE: logps_N})


def _mapped(path: Path, rows: int) -> npt.NDArray[Any]:
    """The array in the file, whose pages are read on first use."""
    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RunFailed(f"{path} cannot be read as numbers: {error}") from error
    if len(found) != rows:
        raise RunFailed(f"{path} has {len(found):,} rows, which are not those of its split")
    return found


def sound_at(path: Path) -> PreparedData | None:
    """The data at `path`, if its tokens, losses and logits have the hashes in its report."""
    if not path.is_dir():
        return None
    try:
        prepared = open_prepared(path)
    except RunFailed:
        return None
    splits = {"train": prepared.train, "validation": prepared.validation, "test": prepared.test}
    for name, split in splits.items():
        if split is not None and split.sha256 != prepared.report.splits[name].sha256:
            return None
    losses = prepared.base_loss
    if losses is not None and sha256_of_numbers(losses) != prepared.report.base_loss:
        return None
    written_files = {
        **{reference_file(name): each for name, each in prepared.report.reference_files.items()},
        **{rows_file(name): each for name, each in prepared.report.row_files.items()},
        **{prompts_file(name): each for name, each in prepared.report.prompt_files.items()},
    }
    for name, sha256 in written_files.items():
        if not (path / name).is_file() or sha256_of(path / name) != sha256:
            return None
    written = prepared.report.teacher_logits
    if written is not None and sha256_of(path / TEACHER_LOGITS) != written:
        return None
    return prepared


def sha256_of_numbers(numbers: npt.NDArray[Any]) -> str:
    """Hash of an array's bytes, without a file header."""
    return hashlib.sha256(numbers.tobytes()).hexdigest()


def write_rows(path: Path, rows_n: Indices) -> str:
    """Write what `PreparedData.rows` returns. The sha256 of the file."""
    np.save(path, rows_n)
    return sha256_of(path)


def derived(
    prepared: PreparedData, sha256: str, add: Callable[[Path], dict[str, Any]]
) -> PreparedData:
    """`prepared` with the files that `add` writes into a folder of their own, named by `sha256`; or
    what an earlier call with that hash left. `add` returns the changed fields of the report.

    Raises:
        StorageError: they cannot be written.
    """
    named = f"{prepared.path.name} {sha256}"
    target = prepared.path.with_name(hashlib.sha256(named.encode()).hexdigest())
    found = sound_at(target)
    if found is not None:
        return found

    def fill(folder: Path) -> None:
        for file in prepared.path.iterdir():
            shutil.copyfile(file, folder / file.name)
        report = replace(prepared.report, **add(folder))
        (folder / DATA_REPORT).write_text(report.to_json())

    keep_folder(target, fill, lambda: sound_at(target) is not None)
    return open_prepared(target)


def keep_folder(target: Path, fill: Callable[[Path], None], is_sound: Callable[[], bool]) -> None:
    """Let `fill` write a folder, which becomes `target`, unless a sound one has appeared there.

    Raises:
        StorageError: the disk is full, or the folder is not writable.
    """
    try:
        _write(target, fill, is_sound)
    except OSError as error:
        raise cannot_hold(target, error) from error


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


def cannot_hold(target: Path, error: OSError) -> StorageError:
    remedy = "write a storage with room that this user may write"
    return StorageError(str(target.parent), f"cannot hold tokens ({error})", remedy)
