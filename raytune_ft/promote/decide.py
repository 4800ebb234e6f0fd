"""Which candidate is promoted: by scores on validation, and the simpler one where they are tied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.config.metrics import Mode
from raytune_ft.errors import ConfigError, RunFailed
from raytune_ft.evaluate.evaluate import Measured
from raytune_ft.evaluate.scores import Difference, Scores, difference


@dataclass(frozen=True)
class Contender:
    """A measured candidate. `simplicity` counts up from 0, the base; equal ones are as simple.

    What is no model is compared with the others, and never promoted.
    """

    name: str
    simplicity: int
    measured: Measured
    is_model: bool = True


@dataclass(frozen=True)
class Verdict:
    """Who is promoted and why.

    Attributes:
        figure, mode: what decided, and which way is better.
        winner: the simplest candidate that the data do not tell from the best one.
        best: the model with the best value.
        differences: of every candidate but the best, its figure minus the best one's.
    """

    figure: str
    mode: Mode
    winner: str
    best: str
    differences: Mapping[str, Difference]

    @property
    def tied(self) -> bool:
        """Whether a simpler candidate was taken since the interval covers zero."""
        return self.winner != self.best


def decide(contenders: Sequence[Contender], figure: str) -> Verdict:
    """The verdict over candidates that were measured on the same examples.

    Raises:
        ConfigError: nothing gives this figure.
        RunFailed: no candidate has a value of it.
    """
    by_name = {one.name: _scores_of(one, figure) for one in contenders}
    mode = next(iter(by_name.values())).mode
    sign = 1 if mode == "min" else -1
    models = [one for one in contenders if one.is_model]
    usable = [one for one in models if by_name[one.name].value == by_name[one.name].value]
    if not usable:
        raise RunFailed(f"{figure} is not a number for any candidate")
    order = sorted(usable, key=lambda one: (sign * by_name[one.name].value, one.simplicity))
    best = order[0]
    differences = {
        one.name: difference(by_name[best.name], by_name[one.name])
        for one in contenders
        if one.name != best.name
    }
    tied = [one for one in order if one is best or differences[one.name].covers_zero]
    winner = min(tied, key=lambda one: one.simplicity)  # of equally simple ones the best
    return Verdict(figure, mode, winner.name, best.name, differences)


def better(new: Difference, mode: Mode) -> bool:
    """Whether a difference is an improvement that the data show."""
    return not new.covers_zero and (new.value < 0) == (mode == "min")


def compared(base: Measured, promoted: Measured) -> dict[str, dict[str, Any]]:
    """Every figure that both have: the difference to the base with its interval.

    The interval is None where the examples are too few.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, scores in promoted.scores.items():
        if name in base.scores:
            new = difference(base.scores[name], scores)
            ends = None if new.interval is None else list(new.interval)
            found[name] = {"difference": new.value, "interval": ends}
    return found


def _scores_of(contender: Contender, figure: str) -> Scores:
    scores = contender.measured.scores
    if figure not in scores:
        raise ConfigError(
            f"promote.metric={figure}",
            "is given by no entry of promote.metrics",
            f"write one of {', '.join(scores)}",
        )
    return scores[figure]
