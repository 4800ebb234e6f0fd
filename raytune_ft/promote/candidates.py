"""The candidates of a promotion: the base, the best checkpoint and merges, as model directories."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from raytune_ft.config.merging import MERGES, tried_merges
from raytune_ft.config.schema import ModelConfig, PromoteConfig
from raytune_ft.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from raytune_ft.merge.fold import fold, open_checkpoint, write_model
from raytune_ft.merge.merge import merge
from raytune_ft.merge.methods import TASK_ARITHMETIC, MergeSettings
from raytune_ft.merge.to_adapter import Refactored, refactor
from raytune_ft.merge.verify import FoldCheck
from raytune_ft.merge.write_model import MAX_SHARD_SIZE, forget_journal
from raytune_ft.model.heads import Head
from raytune_ft.model.load import base_folder
from raytune_ft.model.methods.saved import unfoldable
from raytune_ft.records import Tell

Score = Callable[[Path], float]
"""The deciding figure of a model directory on validation, negated where more is better."""
BASE_NAME = "base"
BASE, BEST, INTERPOLATED, MERGED = range(4)
"""How simple a candidate is, by what it is made of: the base alone, one trial, one trial and the
base, several trials.
"""


@dataclass(frozen=True, eq=False)
class Entry:
    """A candidate.

    Attributes:
        write: makes its model directory, or that of an adapter that cannot be folded.
        settings: what it is made of and how.
        adapter: writes a merge as one PEFT adapter of the given rank, after `write`; None for what
            is not a merge.
    """

    name: str
    simplicity: int
    write: Callable[[Path], FoldCheck | None]
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: Callable[[Path, int], Refactored] | None = None


@dataclass(frozen=True)
class Pantry:
    """What candidates are made of.

    Attributes:
        checkpoints, trials: of the trials, the best first.
        examples: held-out token ids `[S]` on which every written model is checked.
        score: measures a merge while it is made; greedy_soup adds a trial only where that helps.
        head: the task head of the trials, which the base does not have; None without one.
    """

    model: ModelConfig
    checkpoints: Sequence[Path]
    trials: Sequence[str]
    examples: Sequence[Tensor]
    settings: PromoteConfig
    seed: int
    score: Score
    tell: Tell
    head: Head | None = None

    @property
    def merging(self) -> MergeSettings:
        """The settings of `promote.merging`."""
        written = self.settings.merging
        return MergeSettings(scale=written.scale, density=written.density, seed=self.seed)


def entries(pantry: Pantry) -> list[Entry]:
    """All candidates of `promote.merge`, the simplest first: the base, the best trial, merges.

    With a task head the base is not a candidate, since it has no trained head.
    """
    base = Entry(BASE_NAME, BASE, lambda target: write_base(pantry.model, target))
    best = Entry(
        pantry.trials[0],
        BEST,
        lambda target: _write_best(pantry, target),
        {"trials": [pantry.trials[0]]},
    )
    found = [base, best] if pantry.head is None else [best]
    for name in tried_merges(pantry.settings.merge, with_head=pantry.head is not None):
        if MERGES[name].formula is None:
            continue
        if MERGES[name].interpolates:
            found += [_interpolated(pantry, name, alpha) for alpha in _between(pantry)]
        elif len(pantry.checkpoints) > 1:
            found.append(_merged(pantry, name))
        else:
            pantry.tell(f"{name} needs two sound trials, and there is one")
    return found


def _write_best(pantry: Pantry, target: Path) -> FoldCheck | None:
    """The best checkpoint folded into the base, or a copy of an adapter that cannot be folded."""
    checkpoint = pantry.checkpoints[0]
    if unfoldable(checkpoint) is None:
        return fold(
            pantry.model,
            checkpoint,
            target,
            pantry.examples,
            pantry.settings.max_shard_size,
            tell=pantry.tell,
            head=pantry.head,
        )
    target.mkdir(parents=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(checkpoint / name, target / name)
    return None


def write_base(model: ModelConfig, target: Path) -> None:
    """Write the base unchanged. Raises ModelError."""
    with open_checkpoint(model, base_folder(model)) as opened:
        write_model(model, opened, target, MAX_SHARD_SIZE, None, lambda line: None)
        forget_journal(target)


def _between(pantry: Pantry) -> list[float]:
    """The alphas between 0 and 1; those two are the base and the best trial themselves."""
    return [alpha for alpha in pantry.settings.merging.alphas if 0 < alpha < 1]


def _interpolated(pantry: Pantry, name: str, alpha: float) -> Entry:
    """One point between the base and the best trial."""

    def write(target: Path) -> FoldCheck:
        first = pantry.checkpoints[:1]
        return merge(
            pantry.model,
            first,
            target,
            name,
            pantry.examples,
            score=lambda _: 0.0,  # there is one alpha to choose from
            alphas=(alpha,),
            max_shard_size=pantry.settings.max_shard_size,
        ).check

    def adapter(target: Path, rank: int) -> Refactored:
        share = MergeSettings(scale=alpha)
        first = pantry.checkpoints[:1]
        return refactor(pantry.model, first, target, rank, TASK_ARITHMETIC, share)

    settings = {"merge": name, "alpha": alpha, "trials": [pantry.trials[0]]}
    return Entry(f"{name}-{alpha}", INTERPOLATED, write, settings, adapter)


def _merged(pantry: Pantry, name: str) -> Entry:
    """A merge of several trials; `settings` name those that took part once it is written."""
    settings: dict[str, Any] = {"merge": name}
    taken: list[Path] = []

    def write(target: Path) -> FoldCheck:
        report = merge(
            pantry.model,
            pantry.checkpoints,
            target,
            name,
            pantry.examples,
            score=pantry.score,
            settings=pantry.merging,
            max_shard_size=pantry.settings.max_shard_size,
            tell=pantry.tell,
            head=pantry.head,
        )
        settings["trials"] = [pantry.trials[i] for i in report.members]
        taken[:] = [pantry.checkpoints[i] for i in report.members]
        return report.check

    def adapter(target: Path, rank: int) -> Refactored:
        formula = MERGES[name].formula
        assert formula is not None
        return refactor(pantry.model, taken, target, rank, formula(), pantry.merging)

    return Entry(name, MERGED, write, settings, adapter)
