"""Merges by their names: which models take part, what is tried, and what is kept of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from raytune_ft.config.schema import MergeName, ModelConfig
from raytune_ft.errors import ConfigError
from raytune_ft.files import fsync
from raytune_ft.layout import MANIFEST
from raytune_ft.merge.fold import (
    FoldCheck,
    check_written,
    fold,
    require_bytes,
    write_manifest,
    write_model,
)
from raytune_ft.merge.members import Opening, open_members
from raytune_ft.merge.methods import MergeSettings
from raytune_ft.merge.write_model import MAX_SHARD_SIZE
from raytune_ft.model.heads import Head
from raytune_ft.model.load import disk_dtype
from raytune_ft.records import Tell

MERGE_NAMES: tuple[str, ...] = tuple(n for n in get_args(MergeName) if n != "auto")
ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)

Score = Callable[[Path], float]
"""Of a model directory, on validation; less is better."""


@dataclass(frozen=True)
class Tried:
    """A merge that was scored: its members' places in the list, and the share of them (wise_ft)."""

    members: tuple[int, ...]
    alpha: float | None
    score: float


@dataclass(frozen=True)
class MergeReport:
    """What was written. `tried` is all that was scored on the way, in that order."""

    method: str
    members: tuple[int, ...]
    alpha: float | None
    check: FoldCheck
    tried: tuple[Tried, ...] = ()


@dataclass(frozen=True)
class _Maker:
    model: ModelConfig
    opening: Opening
    paths: Sequence[Path]
    examples: Sequence[Tensor]
    max_shard_size: str
    dtype: torch.dtype
    tell: Tell

    def write(
        self, target: Path, method: str, chosen: Sequence[int], settings: MergeSettings
    ) -> FoldCheck:
        made = self.opening.merged(method, chosen, settings)
        files = write_model(made, target, self.max_shard_size, self.dtype, self.tell)
        check = check_written(
            self.model, made, target, self.examples, None, self.dtype, "the merge before rounding"
        )
        require_bytes(target, files)
        names = [self.model.path if i < 0 else str(self.paths[i]) for i in chosen]
        lineage = {"merge": method, "members": names, "settings": asdict(settings)}
        write_manifest(target, files, check, {"base": self.model.path, **lineage})
        return check


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
    dtype: torch.dtype | None = None,
    tell: Tell = lambda line: None,
    head: Head | None = None,
) -> MergeReport:
    """Write one merge of `members` (checkpoints of one base, the best first) into `target`.

    best folds the first; slerp takes the first two, wise_ft the first and the base, the others
    all. greedy_soup and wise_ft ask `score` of what they write beside `target`, and keep the best.
    `examples` are held-out token ids `[S]` that what is written is checked on. `head` is the task
    head that all members were trained with. Resumes what was interrupted.

    Raises:
        ConfigError: an unknown name, too few members, or no `score` for a merge that needs one.
        ModelError, CheckpointError: members that do not fit together.
        MergeError: a value that is not finite, or a check that failed.
        StorageError: `target` holds something else.
    """
    if name not in MERGE_NAMES:
        raise ConfigError(
            f"promote.merge={name}", "is no merge", f"write one of {', '.join(MERGE_NAMES)}"
        )
    if name == "best":
        check = fold(model, members[0], target, examples, max_shard_size, dtype, tell, head)
        return MergeReport(name, (0,), None, check)
    settings = settings or MergeSettings()
    everyone = tuple(range(len(members)))
    with open_members(model, members, head) as opening:
        written = dtype or disk_dtype(model, head)
        maker = _Maker(model, opening, members, examples, max_shard_size, written, tell)
        if name in ("greedy_soup", "wise_ft"):
            if score is None:
                raise ConfigError(
                    f"promote.merge={name}", "chooses by a score", "give it one, or another merge"
                )
            if name == "wise_ft":
                return _wise_ft(maker, target, score, settings, alphas)
            return _greedy_soup(maker, target, score, settings, everyone)
        chosen = everyone[:2] if name == "slerp" else everyone
        method = "linear" if name == "uniform_soup" else name
        return MergeReport(name, chosen, None, maker.write(target, method, chosen, settings))


def _greedy_soup(
    maker: _Maker, target: Path, score: Score, settings: MergeSettings, everyone: tuple[int, ...]
) -> MergeReport:
    """Members by their score, each added if the mean is then better (arXiv 2203.05482)."""
    equal = replace(settings, weights=None)
    soup: tuple[int, ...] = ()
    best: tuple[float, FoldCheck, Path] | None = None
    tried = []
    for index in everyone:
        candidate = (*soup, index)
        place = _beside(target, f"soup-{'-'.join(map(str, candidate))}")
        check = maker.write(place, "linear", candidate, equal)
        found = score(place)
        tried.append(Tried(candidate, None, found))
        better = best is None or found < best[0]
        maker.tell(f"soup of {len(candidate)}: {found:.6f}{'' if better else ', not better'}")
        if better:
            if best is not None:
                shutil.rmtree(best[2])
            soup, best = candidate, (found, check, place)
        else:
            shutil.rmtree(place)
    assert best is not None
    _move(best[2], target)
    return MergeReport("greedy_soup", soup, None, best[1], tuple(tried))


def _wise_ft(
    maker: _Maker, target: Path, score: Score, settings: MergeSettings, alphas: Sequence[float]
) -> MergeReport:
    """Between the base and the best member, the share that scores best (arXiv 2109.01903)."""
    best: tuple[float, FoldCheck, Path, float] | None = None
    tried = []
    for alpha in alphas:
        place = _beside(target, f"alpha-{alpha}")
        shares = replace(settings, weights=(1 - alpha, alpha))
        check = maker.write(place, "linear", (-1, 0), shares)
        found = score(place)
        tried.append(Tried((0,), alpha, found))
        maker.tell(f"alpha {alpha}: {found:.6f}")
        if best is None or found < best[0]:
            if best is not None:
                shutil.rmtree(best[2])
            best = found, check, place, alpha
        else:
            shutil.rmtree(place)
    assert best is not None
    _move(best[2], target)
    return MergeReport("wise_ft", (0,), best[3], best[1], tuple(tried))


def _beside(target: Path, name: str) -> Path:
    """Where a candidate is written. One that an earlier attempt finished, its score is lost."""
    place = target.with_name(f".{target.name}-{name}")
    if (place / MANIFEST).is_file():
        shutil.rmtree(place)
    return place


def _move(place: Path, target: Path) -> None:
    """Into a directory that may be there and empty."""
    place.replace(target)
    fsync(target.parent)
