"""What `promote.merge` and `promote.merging` may say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field

from raytune_ft.config.section import NameIn, Positive, Section


class MergingConfig(Section):
    """How several models become one; null is the method's own default."""

    scale: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="factor of the sum of deltas; 0.4 for task_arithmetic and dare, 1 for ties and "
        "dare_ties",
    )
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="share of each delta that is kept; 0.2 for ties, 0.5 for dare and dare_ties",
    )
    alphas: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)] = Field(
        [0.2, 0.4, 0.6, 0.8, 1.0], description="for wise_ft, shares of the tuned model to try"
    )
    adapter_rank: Positive | None = Field(
        None, description="also write the merge of adapters as one PEFT adapter of this rank"
    )


def _formulas() -> ModuleType:
    from raytune_ft.merge import methods

    return methods


def _makers() -> ModuleType:
    from raytune_ft.merge import merge

    return merge


@dataclass(frozen=True)
class Merge:
    """How the trials looked at become one model.

    Attributes:
        formula: loads the `merge.methods.Formula` that combines tensors of the members; None folds
            the best checkpoint and merges nothing.
        make: loads the function (`merge.merge.MergeJob`, target directory) -> `MergeReport` that
            chooses members and writes their merge; by default all, or as many as the formula takes.
        by_score: `make` needs the score of what it writes.
        interpolates: the members are the base and the best trial, and each of
            `promote.merging.alphas` between 0 and 1 is a candidate of its own.
        with_head: may be written under a task head, which the base does not have.
        auto: `promote.merge: auto` tries it, because it is cheap and seldom worse than one trial.
    """

    formula: Callable[[], Any] | None
    make: Callable[[], Callable[[Any, Any], Any]] = lambda: _makers().merge_all
    by_score: bool = False
    interpolates: bool = False
    with_head: bool = False
    auto: bool = False


MERGES: dict[str, Merge] = {
    "best": Merge(None, with_head=True),
    "uniform_soup": Merge(lambda: _formulas().LINEAR, with_head=True, auto=True),
    "greedy_soup": Merge(
        lambda: _formulas().LINEAR,
        lambda: _makers().greedy_soup,
        by_score=True,
        with_head=True,
        auto=True,
    ),
    "task_arithmetic": Merge(lambda: _formulas().TASK_ARITHMETIC, auto=True),
    "slerp": Merge(lambda: _formulas().SLERP),
    "ties": Merge(lambda: _formulas().TIES),
    "dare": Merge(lambda: _formulas().DARE),
    "dare_ties": Merge(lambda: _formulas().DARE_TIES),
    "wise_ft": Merge(
        lambda: _formulas().LINEAR,
        lambda: _makers().best_share,
        by_score=True,
        interpolates=True,
        auto=True,
    ),
}
AUTO = "auto"
MergeName = Annotated[str, NameIn(MERGES, more=(AUTO,))]


def tried_merges(merge: str, with_head: bool) -> list[str]:
    """The merges that a value of `promote.merge` stands for, those of one trial first."""
    if merge != AUTO:
        return [merge]
    able = [
        name for name, each in MERGES.items() if each.auto and (each.with_head or not with_head)
    ]
    return sorted(able, key=lambda name: not MERGES[name].interpolates)


def merges_with_head() -> list[str]:
    """Values of `promote.merge` that a task head allows."""
    return [*(name for name, each in MERGES.items() if each.with_head), AUTO]
