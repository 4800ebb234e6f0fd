"""The candidates of a promotion: the base, the best checkpoint and merges, as model directories."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Written:
    """What was written for a candidate.

    Attributes:
        check: None where nothing was folded.
        settings: what it is made of and how.
        members: of a merge, those that took part.
    """

    check: FoldCheck | None
    settings: dict[str, Any] = field(default_factory=dict)
    members: tuple[int, ...] = ()


class Write(Protocol):
    """Makes the model directory of a candidate, or that of an adapter that cannot be folded.

    `measure` scores what is being made, for those that choose by it: greedy_soup adds a trial only
    where that helps.
    """

    def __call__(self, target: Path, tell: Tell, measure: Score | None = None) -> Written: ...


class WriteAdapter(Protocol):
    """Writes a merge of these members as one PEFT adapter of a rank."""

    def __call__(
        self, target: Path, rank: int, members: Sequence[int], tell: Tell
    ) -> Refactored: ...


@dataclass(frozen=True, eq=False)
class Entry:
    """A candidate, to be made in any process; `adapter` is None for what is not a merge.

    `by_score`: `write` needs its `measure`.
    """

    name: str
    simplicity: int
    write: Write
    adapter: WriteAdapter | None = None
    by_score: bool = False


@dataclass(frozen=True)
class Pantry:
    """What candidates are made of.

    Attributes:
        checkpoints, trials: of the trials, the best first.
        examples: held-out token ids `[S]` on which every written model is checked.
        head: the task head of the trials, which the base does not have; None without one.
    """

    model: ModelConfig
    checkpoints: Sequence[Path]
    trials: Sequence[str]
    examples: Sequence[Tensor]
    settings: PromoteConfig
    seed: int
    head: Head | None = None

    @property
    def merging(self) -> MergeSettings:
        """The settings of `promote.merging`."""
        written = self.settings.merging
        return MergeSettings(scale=written.scale, density=written.density, seed=self.seed)


def entries(pantry: Pantry, tell: Tell) -> list[Entry]:
    """All candidates of `promote.merge`, the simplest first: the base, the best trial, merges.

    With a task head the base is not a candidate, since it has no trained head.
    """
    base = Entry(BASE_NAME, BASE, partial(_write_base, pantry))
    best = Entry(pantry.trials[0], BEST, partial(_write_best, pantry))
    found = [base, best] if pantry.head is None else [best]
    for name in tried_merges(pantry.settings.merge, with_head=pantry.head is not None):
        if MERGES[name].formula is None:
            continue
        if MERGES[name].interpolates:
            found += [_interpolated(pantry, name, alpha) for alpha in _between(pantry)]
        elif len(pantry.checkpoints) > 1:
            found.append(_merged(pantry, name))
        else:
            tell(f"{name} needs two sound trials, and there is one")
    return found


def _write_best(pantry: Pantry, target: Path, tell: Tell, measure: Score | None = None) -> Written:
    """The best checkpoint folded into the base, or a copy of an adapter that cannot be folded."""
    checkpoint, settings = pantry.checkpoints[0], {"trials": [pantry.trials[0]]}
    if unfoldable(checkpoint) is None:
        check = fold(
            pantry.model,
            checkpoint,
            target,
            pantry.examples,
            pantry.settings.max_shard_size,
            tell=tell,
            head=pantry.head,
        )
        return Written(check, settings)
    target.mkdir(parents=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(checkpoint / name, target / name)
    return Written(None, settings)


def _write_base(pantry: Pantry, target: Path, tell: Tell, measure: Score | None = None) -> Written:
    write_base(pantry.model, target)
    return Written(None)


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

    def write(target: Path, tell: Tell, measure: Score | None = None) -> Written:
        first = pantry.checkpoints[:1]
        made = merge(
            pantry.model,
            first,
            target,
            name,
            pantry.examples,
            score=lambda _: 0.0,  # there is one alpha to choose from
            alphas=(alpha,),
            max_shard_size=pantry.settings.max_shard_size,
        )
        settings = {"merge": name, "alpha": alpha, "trials": [pantry.trials[0]]}
        return Written(made.check, settings)

    def adapter(target: Path, rank: int, members: Sequence[int], tell: Tell) -> Refactored:
        share = MergeSettings(scale=alpha)
        first = pantry.checkpoints[:1]
        return refactor(pantry.model, first, target, rank, TASK_ARITHMETIC, share)

    return Entry(f"{name}-{alpha}", INTERPOLATED, write, adapter)


def _merged(pantry: Pantry, name: str) -> Entry:
    """A merge of several trials, of which some may take part."""

    def write(target: Path, tell: Tell, measure: Score | None = None) -> Written:
        report = merge(
            pantry.model,
            pantry.checkpoints,
            target,
            name,
            pantry.examples,
            score=measure,
            settings=pantry.merging,
            max_shard_size=pantry.settings.max_shard_size,
            tell=tell,
            head=pantry.head,
        )
        trials = [pantry.trials[i] for i in report.members]
        return Written(report.check, {"merge": name, "trials": trials}, report.members)

    def adapter(target: Path, rank: int, members: Sequence[int], tell: Tell) -> Refactored:
        taken = [pantry.checkpoints[i] for i in members]
        formula = MERGES[name].formula
        assert formula is not None
        return refactor(pantry.model, taken, target, rank, formula(), pantry.merging)

    return Entry(name, MERGED, write, adapter, MERGES[name].by_score)
