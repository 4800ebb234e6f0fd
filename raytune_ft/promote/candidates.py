"""What may be promoted: the base, the best checkpoint and merges, each a model directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from raytune_ft.config.metrics import SOUPS
from raytune_ft.config.schema import MergeName, ModelConfig, PromoteConfig
from raytune_ft.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from raytune_ft.merge.fold import FoldCheck, fold
from raytune_ft.merge.merge import merge
from raytune_ft.merge.methods import MergeSettings
from raytune_ft.merge.to_adapter import Refactored, refactor
from raytune_ft.model.heads import Head
from raytune_ft.model.load import disk_dtype, load_base
from raytune_ft.model.methods.saved import unfoldable
from raytune_ft.records import Tell

Score = Callable[[Path], float]
"""The deciding figure of a model directory on validation, turned so that less is better."""
BASE_NAME = "base"
BASE, BEST, INTERPOLATED, MERGED = range(4)
"""How simple candidates are: nothing, one trial, one trial and the base, several trials."""
AUTO: tuple[MergeName, ...] = ("wise_ft", "uniform_soup", "greedy_soup", "task_arithmetic")
"""What `merge: auto` tries: cheap to make, and seldom worse than one trial."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A candidate; `write` makes its model directory, or that of an adapter that cannot be folded.
    `settings` are what it was made with.

    `adapter` writes a merge as one PEFT adapter of a rank, once it was written as a model.
    """

    name: str
    simplicity: int
    write: Callable[[Path], FoldCheck | None]
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: Callable[[Path, int], Refactored] | None = None


@dataclass(frozen=True)
class Pantry:
    """What candidates are made of: the base, the trials' checkpoints (the best first) and names.

    `examples` are held-out token ids `[S]` that what is written is checked on; `score` is asked by
    merges that look before they add. `head` is the task head that all trials have, and the base
    has not.
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
        """As `promote.merging` says."""
        written = self.settings.merging
        return MergeSettings(scale=written.scale, density=written.density, seed=self.seed)


def entries(pantry: Pantry) -> list[Entry]:
    """All candidates of `promote.merge`, the simplest first: the base, the best trial, merges.

    Under a task head the base is none: it has no head that says anything.
    """
    written = pantry.settings.merge
    base = Entry(BASE_NAME, BASE, lambda target: write_base(pantry.model, target))
    best = Entry(
        pantry.trials[0],
        BEST,
        lambda target: _write_best(pantry, target),
        {"trials": [pantry.trials[0]]},
    )
    found = [base, best] if pantry.head is None else [best]
    auto = AUTO if pantry.head is None else tuple(name for name in AUTO if name in SOUPS)
    for name in auto if written == "auto" else () if written == "best" else (written,):
        if name == "wise_ft":
            found += [_interpolated(pantry, alpha) for alpha in _between(pantry)]
        elif len(pantry.checkpoints) > 1:
            found.append(_merged(pantry, name))
        else:
            pantry.tell(f"{name} needs two sound trials, and there is one")
    return found


def _write_best(pantry: Pantry, target: Path) -> FoldCheck | None:
    """Folded into the base, or as it is."""
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
    """The base as it is. Raises ModelError."""
    built: Any = load_base(model, disk_dtype(model))
    built.save_pretrained(str(target))


def _between(pantry: Pantry) -> list[float]:
    """The alphas but 0 and 1, which are candidates of their own."""
    return [alpha for alpha in pantry.settings.merging.alphas if 0 < alpha < 1]


def _interpolated(pantry: Pantry, alpha: float) -> Entry:
    """One point between the base and the best trial."""

    def write(target: Path) -> FoldCheck:
        first = pantry.checkpoints[:1]
        return merge(
            pantry.model,
            first,
            target,
            "wise_ft",
            pantry.examples,
            score=lambda _: 0.0,  # there is one alpha to choose from
            alphas=(alpha,),
            max_shard_size=pantry.settings.max_shard_size,
        ).check

    def adapter(target: Path, rank: int) -> Refactored:
        share = MergeSettings(scale=alpha)
        first = pantry.checkpoints[:1]
        return refactor(pantry.model, first, target, rank, "task_arithmetic", share)

    settings = {"merge": "wise_ft", "alpha": alpha, "trials": [pantry.trials[0]]}
    return Entry(f"wise_ft-{alpha}", INTERPOLATED, write, settings, adapter)


def _merged(pantry: Pantry, name: MergeName) -> Entry:
    """A merge of several trials; which of them took part is known once it is written."""
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
        method = "linear" if name.endswith("soup") else name
        return refactor(pantry.model, taken, target, rank, method, pantry.merging)

    return Entry(name, MERGED, write, settings, adapter)
