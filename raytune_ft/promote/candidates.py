"""What may be promoted: the base, the best checkpoint and merges, each a model directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from raytune_ft.config.schema import ModelConfig
from raytune_ft.model.build import disk_dtype, load_base
from raytune_ft.promote.fold import FoldCheck, fold
from raytune_ft.promote.select import Selection

BASE_NAME = "base"
BASE, BEST = 0, 1
"""How simple candidates are: nothing, one trial, then merges of several."""

Score = Callable[[Path], float]
"""The deciding figure of a model directory on validation, turned so that less is better."""


@dataclass(frozen=True)
class Entry:
    """A candidate; `write` makes its model directory. `settings` are what it was made with."""

    name: str
    simplicity: int
    write: Callable[[Path], FoldCheck | None]
    settings: dict[str, Any] = field(default_factory=dict)


def entries(
    selection: Selection, model: ModelConfig, examples: Sequence[Tensor], score: Score
) -> list[Entry]:
    """All candidates of `promote.merge`, the simplest first.

    `examples` are held-out token ids `[S]` that folds are checked on.
    """
    best = selection.candidate

    def write_best(target: Path) -> FoldCheck:
        return fold(model, best.checkpoint, target, examples)

    return [
        Entry(BASE_NAME, BASE, lambda target: write_base(model, target)),
        Entry(best.trial or selection.name, BEST, write_best, {"trials": [best.trial or "run"]}),
    ]


def write_base(model: ModelConfig, target: Path) -> None:
    """The base as it is. Raises ModelError."""
    built: Any = load_base(model, disk_dtype(model))
    built.save_pretrained(str(target))
