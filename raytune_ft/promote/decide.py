"""Which candidate is promoted: by scores on validation, and the simpler one where they are tied."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.config.objectives import Mode
from raytune_ft.errors import ConfigError, RunFailed
from raytune_ft.evaluate.evaluate import Measured
from raytune_ft.evaluate.scores import CONFIDENCE, FEWEST_EXAMPLES, Difference, Scores, difference


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with its reference, and how base and promoted model continue it."""

    prompt: str
    reference: str
    base: str
    promoted: str


@dataclass(frozen=True)
class CandidateRecord:
    """A candidate on validation: `difference` and `interval` are to the best one, of `metric`.

    Of the best one itself both are None; `interval` is, too, where the examples are too few.
    """

    name: str
    simplicity: int
    figures: dict[str, float]
    difference: float | None
    interval: tuple[float, float] | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """`evaluation.json`.

    Attributes:
        split, examples: what `base`, `promoted` and `differences` were measured on.
        reference: what `base` has the figures of: the base, or of a classifier, whose base is no
            model, a constant answer.
        looks: how often this run's or sweep's split has been measured.
        metric, mode: the figure that decided, and which way it is better.
        winner: the candidate that was promoted; `tied` with a less simple one that looks better.
        differences: figure -> promoted minus base, with a 95% interval, None of too few examples.
        candidates: all of them, on the validation split.
        improved: whether the promoted model is better than the base beyond the interval.
    """

    split: str
    examples: int
    base: dict[str, float]
    promoted: dict[str, float]
    looks: int
    verdict: str
    metric: str
    mode: str
    winner: str
    tied: bool
    improved: bool
    differences: dict[str, dict[str, Any]]
    candidates: tuple[CandidateRecord, ...]
    validation_examples: int
    confidence: float = CONFIDENCE
    samples: tuple[Sample, ...] = field(default=())
    reference: str = "base"


def evaluation_of(
    verdict: Verdict,
    contenders: Sequence[Contender],
    settings: Mapping[str, dict[str, Any]],
    split: str,
    base: Measured,
    promoted: Measured,
    looks: int,
    reference: str = "base",
) -> Evaluation:
    """The record of a promotion; `base` and `promoted` were measured on `split`."""
    differences = compared(base, promoted)
    held_out = difference(base.scores[verdict.figure], promoted.scores[verdict.figure])
    return Evaluation(
        split=split,
        examples=_examples(base),
        base=base.figures,
        promoted=promoted.figures,
        looks=looks,
        verdict=_sentence(
            verdict, contenders[0].measured, base, promoted, held_out, split, reference
        ),
        metric=verdict.figure,
        mode=verdict.mode,
        winner=verdict.winner,
        tied=verdict.tied,
        improved=better(held_out, verdict.mode),
        differences=differences,
        candidates=tuple(
            _candidate(one, verdict, settings.get(one.name, {})) for one in contenders
        ),
        validation_examples=_examples(contenders[0].measured),
        samples=samples_of(base, promoted),
        reference=reference,
    )


def score_lines(split: str, name: str, measured: Measured) -> Iterator[str]:
    """One JSON object for each example: split, candidate, example and its figures.

    Figures over another set, such as retention, follow under that set's own name.
    """
    by_length: dict[tuple[str, int], dict[str, list[float]]] = {}
    for figure, scores in measured.scores.items():
        group = "retention" if figure.startswith("retention_") else figure.rpartition("/")[0]
        each = scores.each
        if each is not None:
            figures = by_length.setdefault((group, len(each)), {})
            figures[figure.rpartition("/")[2]] = each.tolist()
    for (group, count), figures in by_length.items():
        for i in range(count):
            facts: dict[str, Any] = {"split": group or split, "candidate": name, "example": i}
            if not group and count == len(measured.continuations):
                facts["generated"] = measured.continuations[i].generated
            values = {figure: round(each[i], 6) for figure, each in figures.items()}
            yield json.dumps(facts | values, ensure_ascii=False) + "\n"


def samples_of(base: Measured, promoted: Measured, count: int = 8) -> tuple[Sample, ...]:
    """The first prompts, as both models continue them."""
    pairs = zip(base.continuations, promoted.continuations, strict=True)
    return tuple(
        Sample(old.prompt, old.reference, old.generated, new.generated)
        for old, new in list(pairs)[:count]
    )


def _candidate(contender: Contender, verdict: Verdict, settings: dict[str, Any]) -> CandidateRecord:
    to_best = verdict.differences.get(contender.name)
    return CandidateRecord(
        contender.name,
        contender.simplicity,
        contender.measured.figures,
        to_best.value if to_best else None,
        to_best.interval if to_best else None,
        settings,
    )


def _examples(measured: Measured) -> int:
    return _count(measured, "eval_loss")


def _sentence(
    verdict: Verdict,
    validation: Measured,
    base: Measured,
    promoted: Measured,
    held_out: Difference,
    split: str,
    reference: str,
) -> str:
    figure = verdict.figure
    old, new = base.figures[figure], promoted.figures[figure]
    simpler = f"; {verdict.winner} and {verdict.best} are tied on validation" * verdict.tied
    if verdict.winner == "base":
        count = _count(validation, figure)
        if count < FEWEST_EXAMPLES:
            return f"the base is kept: {_too_few(count)} on validation"
        return f"the base is kept: no candidate is better on validation{simpler}"
    how = "tied with" if held_out.covers_zero else "not better than"
    if better(held_out, verdict.mode):
        how = "better than"
    sure = f"{CONFIDENCE:.0%} interval of the difference"
    if held_out.interval is None:
        how, sure = "not told from", _too_few(_count(base, figure))
    else:
        sure += f" {held_out.low:.4f} to {held_out.high:.4f}"
    figures = f"{figure} {new:.4f} against {old:.4f}, {sure} on {split}"
    return f"promoted is {how} {reference} ({figures}){simpler}"


def _count(measured: Measured, figure: str) -> int:
    return len(measured.scores[figure].columns[0])


def _too_few(count: int) -> str:
    return f"{count} examples are too few to tell"


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
