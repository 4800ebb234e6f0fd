"""What happened to each row: the data report, `report.json` beside the tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_ft.config.data import DataConfig
from raytune_ft.data.arrays import spans
from raytune_ft.data.split import TokenizedSplit, length_range
from raytune_ft.errors import DataError, StorageError
from raytune_ft.records import to_json


def check_same(saved: Path, now: DataReport) -> None:
    """Compare by content: a moved source or tokens that were made again are the same data.

    Raises:
        DataError: a split has other examples than in the report at `saved`, or they have other
            losses under the base, or another teacher's logits.
        StorageError: there is no report at `saved`.
    """
    try:
        before = DataReport.from_json(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            str(saved), "is not a data report", "bring it back, or write another name"
        ) from error
    for name in {**before.splits, **now.splits}:
        old, new = before.splits.get(name), now.splits.get(name)
        if _sha256(old) != _sha256(new):
            raise DataError(
                f"data.{name} with {_shown(new)}",
                f"is not what the run began with, {_shown(old)}",
                "bring back the rows that it had, or train under another name",
            )
    for name, sha256 in now.prompt_files.items():
        if before.prompt_files.get(name) != sha256:
            raise DataError(
                f"data.{name}",
                "has rows of other columns than the run began with, and rewards read them",
                "bring back the rows that it had, or train under another name",
            )
    order = ", and other losses give another order of examples"
    read = [
        *(
            (f"rewards.{name} with a file", before.reward_files.get(name), sha256, "", "file")
            for name, sha256 in now.reward_files.items()
        ),
        ("data.curriculum with losses", before.base_loss, now.base_loss, order, "token cache"),
        ("a reference with files", before.reference, now.reference, "", "weights"),
        ("train.kd.teacher with files", before.teacher, now.teacher, "", "weights"),
    ]
    for what, had, has, why, back in read:
        if had and has and had != has:
            raise DataError(
                f"{what} of sha256 {has[:12]}",
                f"is not what the run began with, {had[:12]}{why}",
                f"bring back the {back} that it had, or train under another name",
            )


def _sha256(split: SplitReport | None) -> str | None:
    return split.sha256 if split else None


def _shown(split: SplitReport | None) -> str:
    return f"{split.examples:,} examples (sha256 {split.sha256[:12]})" if split else "nothing"


def prompt_key(text: str) -> bytes:
    """A hash of a prompt; equal where only case and white space differ."""
    normal = " ".join(text.casefold().split())
    return hashlib.blake2b(normal.encode(), digest_size=16).digest()


def check_overlap(data: DataConfig, report: DataReport, limit: float) -> None:
    """Refuse a split that repeats too many prompts of one that is trained or selected on.

    A validation split drawn from train repeats as much as train does, and is not checked.

    Raises:
        DataError: more than `limit` of a split's prompts stand in one that comes before it.
    """
    for pair, count in report.overlaps.items():
        other, name = pair.split("/")
        total = report.splits[name].examples
        if name == "validation" and isinstance(data.validation, float):
            continue
        if count > limit * total:
            why = (
                "selecting on the test set is refused"
                if other == "validation"
                else "prompts that were trained on measure memorisation"
            )
            raise DataError(
                f"data.{name}",
                f"shares {count:,} of its {total:,} prompts with data.{other}, more than "
                f"promote.max_overlap={limit:g} allows ({why})",
                f"take them out of data.{other}, or raise promote.max_overlap",
            )


@dataclass(frozen=True)
class SourceReport:
    """One source; `rows == usable + sum(bad.values()) + dropped`.

    Attributes:
        name: file name or hub id.
        sha256: of the file, or of the Arrow files behind a data set.
        bad: cause -> rows.
        first_bad: cause -> the first such row, as "origin: detail".
        truncated: usable rows whose end was cut at `data.max_length`.
        dropped: rows over `data.max_length` under `too_long: drop`; they are not bad.
        longest: tokens of the longest row, before anything was cut.
        tokens: of the usable rows.
        label_tokens: of the usable rows, those that carry loss.
        unread: column -> rows that have a value there, which the run does not read.
        lost: what the chat template leaves out -> usable rows.
        first_lost: what it leaves out -> the first such row.
        notes: key of `NOTES` -> usable rows.
        ends: special token -> trained turns that end with it; "" for those that end with none.
    """

    name: str
    format: str
    sha256: str
    rows: int
    usable: int
    bad: dict[str, int]
    first_bad: dict[str, str]
    truncated: int
    dropped: int
    longest: int
    tokens: int
    label_tokens: int
    unread: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    first_lost: dict[str, str] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)


NOTES = {
    "longer_prompt": "{count} rows in which the template prompts with more than it then writes, "
    "such as an opened <think>",
    "own_example": "{count} rows in which the template writes a turn differently once others "
    "follow, so that it is learnt in an example of its own",
    "special_text": "{count} rows that spell special tokens, which are read as text",
    "turns_too_far": "{count} rows with turns that are not learnt, because all that they say lies "
    "behind `data.max_length`",
    "untrained_turn": "{count} rows with turns that are marked not to be trained or that `turns` "
    "leaves out",
}
"""Facts of a source that its reader may not expect, by their keys in a report."""


def facts(source: SourceReport) -> list[str]:
    """What a reader of the source may not expect: columns that are not read, parts that the chat
    template leaves out, and the `NOTES`.
    """
    rows = f"of {source.rows:,} rows"
    unread = [f"{name} ({count:,} {rows})" for name, count in source.unread.items()]
    found = [f"not read: {', '.join(unread)}"] if unread else []
    found += [f"{n:,} rows whose {kind} the template leaves out" for kind, n in source.lost.items()]
    return found + [NOTES[name].format(count=f"{n:,}") for name, n in source.notes.items()]


@dataclass(frozen=True)
class SplitReport:
    """One split; `sha256` is that of its tokens, masks and their order.

    `sources` are the examples of each source by its name, where the split has several. `lengths`
    counts examples by their length, see `length_counts`.
    """

    examples: int
    tokens: int
    label_tokens: int
    sha256: str
    sources: dict[str, int] = field(default_factory=dict)
    lengths: tuple[tuple[int, int], ...] = ()


BINS = 12


def length_counts(split: TokenizedSplit, limit: int) -> tuple[tuple[int, int], ...]:
    """How many examples have their longest sequence in each of about `BINS` equal ranges up to
    `limit` tokens: (the last length of the range, examples).
    """
    longest = length_range(split.part_offsets)[1]
    edges = np.unique(np.linspace(0, min(limit, longest), BINS + 1).astype(np.int64))
    edges[-1] = max(edges[-1], longest)
    counts = np.zeros(len(edges), np.int64)
    for at in spans(len(split)):
        ends = split.part_offsets[at.start * split.parts : at.stop * split.parts + 1]
        lengths = np.diff(ends).reshape(-1, split.parts).max(1)
        counts += np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
    return tuple(zip(edges[1:].tolist(), counts[1:].tolist(), strict=True))


def source_counts(numbers_n: npt.NDArray[Any], names: Sequence[str]) -> dict[str, int]:
    """The examples of each source that has any, from the number of the source of each."""
    counts = [int(np.count_nonzero(numbers_n == number)) for number in range(len(names))]
    return {name: count for name, count in zip(names, counts, strict=True) if count}


@dataclass(frozen=True)
class PairsReport:
    """What a split of pairs of answers is like.

    Attributes:
        prompts: different ones.
        chosen_tokens, rejected_tokens: mean lengths of the answers.
        longer_chosen: share of pairs whose chosen answer is the longer one; where both are equally
            long, half a pair. Far from 0.5, a model learns to write at that length.
        contradictory: pairs whose answers stand in another pair the other way round.
    """

    prompts: int
    chosen_tokens: float
    rejected_tokens: float
    longer_chosen: float
    contradictory: int

    def __str__(self) -> str:
        found = (
            f"{self.prompts:,} prompts; the longer answer is chosen in {self.longer_chosen:.0%} of "
            f"pairs (mean {self.chosen_tokens:.0f} tokens against {self.rejected_tokens:.0f})"
        )
        return found + (f"; {self.contradictory:,} contradict others" if self.contradictory else "")


@dataclass(frozen=True)
class DataReport:
    """The report on all sources and splits.

    Attributes:
        sources: "train" and, where they are sources of their own, "validation" and "test"; of
            several, "train.NAME" and so on.
        splits: "train", "validation" and, if there is one, "test".
        duplicates: "train/validation" -> examples of validation that train holds too (same tokens
            and same mask), and so for every pair; "train.A/train.B" of two sources of train.
        overlaps: for the same pairs of splits, examples of the second whose prompt the first holds
            too; case and white space do not count.
        notes: remarks for the user, one sentence each.
        names: source names behind the numbers of the column `source`; empty if no split has several
            sources.
        base_loss: sha256 of the losses that the curriculum sorts by.
        teacher: sha256 of what the teacher's logits depend on beside the data.
        teacher_logits: sha256 of the file that holds them.
        labels: of a classification, in class order.
        problem: `data.problem` of a classification, else None.
        pairs: of the splits whose examples are pairs of answers.
        reference: sha256 of what the reference's log-probabilities depend on beside the data.
        reference_files: split -> sha256 of the file that holds them.
        row_files: split -> sha256 of the file that holds the number of each example's row.
        prompt_files: split -> sha256 of the file that holds its prompts and their rows, where
            they are answered during training.
        prompt_columns: split -> the columns that any row of that file has.
        reward_files: name of a reward that is trained on -> sha256 of the file of its function.
    """

    sources: dict[str, SourceReport]
    splits: dict[str, SplitReport]
    duplicates: dict[str, int]
    notes: tuple[str, ...] = ()
    overlaps: dict[str, int] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    base_loss: str | None = None
    teacher: str | None = None
    teacher_logits: str | None = None
    labels: tuple[str, ...] = ()
    problem: str | None = None
    pairs: dict[str, PairsReport] = field(default_factory=dict)
    reference: str | None = None
    reference_files: dict[str, str] = field(default_factory=dict)
    row_files: dict[str, str] = field(default_factory=dict)
    prompt_files: dict[str, str] = field(default_factory=dict)
    prompt_columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reward_files: dict[str, str] = field(default_factory=dict)

    @property
    def turn_ends(self) -> list[str]:
        """The special tokens with which trained turns end."""
        return sorted({end for source in self.sources.values() for end in source.ends if end})

    def to_json(self) -> str:
        """Indented JSON of all of it."""
        return to_json(self, indent=2)

    @classmethod
    def from_json(cls, text: str) -> DataReport:
        """The inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: the text is something else.
        """
        content = json.loads(text)
        return cls(
            sources={name: SourceReport(**item) for name, item in content["sources"].items()},
            splits={name: _split_report(item) for name, item in content["splits"].items()},
            duplicates=dict(content["duplicates"]),
            notes=tuple(content["notes"]),
            overlaps=dict(content.get("overlaps", {})),
            names=tuple(content.get("names", ())),
            base_loss=content.get("base_loss"),
            teacher=content.get("teacher"),
            teacher_logits=content.get("teacher_logits"),
            labels=tuple(content.get("labels", ())),
            problem=content.get("problem"),
            pairs={name: PairsReport(**item) for name, item in content.get("pairs", {}).items()},
            reference=content.get("reference"),
            reference_files=dict(content.get("reference_files", {})),
            row_files=dict(content.get("row_files", {})),
            prompt_files=dict(content.get("prompt_files", {})),
            prompt_columns={
                name: tuple(columns) for name, columns in content.get("prompt_columns", {}).items()
            },
            reward_files=dict(content.get("reward_files", {})),
        )


def _split_report(item: dict[str, Any]) -> SplitReport:
    lengths = tuple((high, count) for high, count in item.pop("lengths", ()))
    return SplitReport(**item, lengths=lengths)


def describe_pairs(split: TokenizedSplit, prompts: int, contradictory: int) -> PairsReport:
    """The figures of a split of pairs, of which these two are counted elsewhere."""
    chosen = rejected = longer = 0
    for at in spans(len(split)):
        chosen_n, rejected_n = split.labels_at(at).T
        chosen, rejected = chosen + int(chosen_n.sum()), rejected + int(rejected_n.sum())
        longer += int((1 + np.sign(chosen_n - rejected_n)).sum())
    return PairsReport(
        prompts=prompts,
        chosen_tokens=chosen / len(split),
        rejected_tokens=rejected / len(split),
        longer_chosen=longer / len(split) / 2,
        contradictory=contradictory,
    )
