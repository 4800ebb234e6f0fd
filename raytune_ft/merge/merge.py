"""Write a merge: which members take part, which candidates are tried, which one is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from raytune_ft.config.merging import MERGES
from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ConfigError
from raytune_ft.files import fsync
from raytune_ft.layout import MANIFEST
from raytune_ft.merge.fold import check_written, fold, require_bytes, write_manifest, write_model
from raytune_ft.merge.members import Opening, open_members
from raytune_ft.merge.methods import Formula, MergeSettings
from raytune_ft.merge.verify import FoldCheck
from raytune_ft.merge.write_model import MAX_SHARD_SIZE
from raytune_ft.model.heads import Head
from raytune_ft.records import Tell

ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)

Score = Callable[[Path], float]
"""The score of a model directory on validation; lower is better."""


@dataclass(frozen=True)
class Tried:
    """A merge that was scored: its members' indices, and their share against the base (wise_ft)."""

    members: tuple[int, ...]
    alpha: float | None
    score: float


@dataclass(frozen=True)
class MergeReport:
    """What was written. `tried` are all scored candidates, in order."""

    method: str
    members: tuple[int, ...]
    alpha: float | None
    check: FoldCheck
    tried: tuple[Tried, ...] = ()


@dataclass(frozen=True)
class MergeJob:
    """One merge and its inputs.

    Attributes:
        name: the entry of `MERGES`.
        formula: how the members' tensors are combined.
        opening: the base and the members, open; `paths` are the members, the best first.
        settings: those of `promote.merging`.
        score: of a model directory, for merges that choose between candidates; may be None.
        alphas: shares of the best member that `best_share` tries.
        examples: held-out token ids `[S]` to check the written model on.
    """

    name: str
    formula: Formula
    model: ModelConfig
    opening: Opening
    paths: Sequence[Path]
    settings: MergeSettings
    score: Score | None
    alphas: Sequence[float]
    examples: Sequence[Tensor]
    max_shard_size: str
    tell: Tell

    def write(self, target: Path, chosen: Sequence[int], settings: MergeSettings) -> FoldCheck:
        """Writes the merge of some members into `target` and checks it; -1 stands for the base."""
        made = self.opening.merged(self.formula, chosen, settings)
        files = write_model(self.model, made, target, self.max_shard_size, None, self.tell)
        check = check_written(
            self.model, made, target, self.examples, None, "the merge before rounding"
        )
        require_bytes(target, files)
        names = [self.model.path if i < 0 else str(self.paths[i]) for i in chosen]
        lineage = {"merge": self.formula.name, "members": names, "settings": asdict(settings)}
        write_manifest(target, files, check, {"base": self.model.path, **lineage})
        return check

    def required_score(self) -> Score:
        """The score. Raises ConfigError if there is none."""
        if self.score is None:
            raise ConfigError(
                f"promote.merge={self.name}",
                "chooses by a score, and none is given",
                "write another merge",
            )
        return self.score


def merge(
    model: ModelConfig,
    members: Sequence[Path],
    target: Path,
    name: str,
    examples: Sequence[Tensor],
    score: Score | None = None,
    settings: MergeSettings | None = None,
    alphas: Sequence[float] = ALPHAS,
    max_shard_size: str = MAX_SHARD_SIZE,
    tell: Tell = lambda line: None,
    head: Head | None = None,
) -> MergeReport:
    """Write one merge of `members` (checkpoints of one base, the best first) into `target`.

    `best` folds the first member; every other entry of `MERGES` chooses its members itself. Those
    that choose by `score` write candidates beside `target` and keep the best. `examples` are
    held-out token ids `[S]` to check the written model on. `head` is the task head of all members.
    An interrupted merge is continued.

    Raises:
        ConfigError: an unknown name, too few members, or no `score` for a merge that needs one.
        ModelError, CheckpointError: members that do not fit together.
        MergeError: a value that is not finite, or a check that failed.
        StorageError: `target` holds something else.
    """
    if name not in MERGES:
        raise ConfigError(
            f"promote.merge={name}", "is not a merge", f"write one of {', '.join(MERGES)}"
        )
    found = MERGES[name]
    if found.formula is None:
        check = fold(model, members[0], target, examples, max_shard_size, None, tell, head)
        return MergeReport(name, (0,), None, check)
    with open_members(model, members, head) as opening:
        job = MergeJob(
            name=name,
            formula=found.formula(),
            model=model,
            opening=opening,
            paths=members,
            settings=settings or MergeSettings(),
            score=score,
            alphas=alphas,
            examples=examples,
            max_shard_size=max_shard_size,
            tell=tell,
        )
        report: MergeReport = found.make()(job, target)
        return report


def merge_all(job: MergeJob, target: Path) -> MergeReport:
    """All members, or the first `formula.most`."""
    chosen = tuple(range(len(job.paths)))[: job.formula.most]
    return MergeReport(job.name, chosen, None, job.write(target, chosen, job.settings))


def greedy_soup(job: MergeJob, target: Path) -> MergeReport:
    """Members by their score, each added if the mean is then better (arXiv 2203.05482)."""
    score = job.required_score()
    equal = replace(job.settings, weights=None)
    soup: tuple[int, ...] = ()
    best: tuple[float, FoldCheck, Path] | None = None
    tried = []
    for index in range(len(job.paths)):
        candidate = (*soup, index)
        place = _beside(target, f"soup-{'-'.join(map(str, candidate))}")
        check = job.write(place, candidate, equal)
        found = score(place)
        tried.append(Tried(candidate, None, found))
        better = best is None or found < best[0]
        job.tell(f"soup of {len(candidate)}: {found:.6f}{'' if better else ', not better'}")
        if better:
            if best is not None:
                shutil.rmtree(best[2])
            soup, best = candidate, (found, check, place)
        else:
            shutil.rmtree(place)
    assert best is not None
    _move(best[2], target)
    return MergeReport(job.name, soup, None, best[1], tuple(tried))


def best_share(job: MergeJob, target: Path) -> MergeReport:
    """Between the base and the best member, the share that scores best (arXiv 2109.01903)."""
    score = job.required_score()
    best: tuple[float, FoldCheck, Path, float] | None = None
    tried = []
    for alpha in job.alphas:
        place = _beside(target, f"alpha-{alpha}")
        shares = replace(job.settings, weights=(1 - alpha, alpha))
        check = job.write(place, (-1, 0), shares)
        found = score(place)
        tried.append(Tried((0,), alpha, found))
        job.tell(f"alpha {alpha}: {found:.6f}")
        if best is None or found < best[0]:
            if best is not None:
                shutil.rmtree(best[2])
            best = found, check, place, alpha
        else:
            shutil.rmtree(place)
    assert best is not None
    _move(best[2], target)
    return MergeReport(job.name, (0,), best[3], best[1], tuple(tried))


def _beside(target: Path, name: str) -> Path:
    """Where a candidate is written. One from an earlier attempt is deleted: its score is lost."""
    place = target.with_name(f".{target.name}-{name}")
    if (place / MANIFEST).is_file():
        shutil.rmtree(place)
    return place


def _move(place: Path, target: Path) -> None:
    """Rename `place` to `target`, which may exist if it is empty."""
    place.replace(target)
    fsync(target.parent)
