"""Decide which candidate is promoted, and record the decision as `evaluation.json`.

Candidates are compared by their scores on validation; of those that are tied, the simplest wins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.config.objectives import Mode
from raytune_ft.errors import ConfigError, RunFailed
from raytune_ft.evaluate.evaluate import Measured
from raytune_ft.evaluate.scores import CONFIDENCE, FEWEST_EXAMPLES, Difference, Scores, difference
from raytune_ft.format import NOT_FINITE, interval, number

SAMPLES = 8
"""Prompts that the record shows with what both models say."""


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, its reference, and both models' continuations."""

    prompt: str
    reference: str
    base: str
    promoted: str


@dataclass(frozen=True)
class CandidateRecord:
    """A candidate on the validation split.

    Attributes:
        simplicity: 0 is the base; a smaller number is simpler.
        difference, interval: its value of the deciding metric minus the best candidate's. Both are
            None for the best candidate and where its value is not finite; `interval` is also None
            where the examples are too few.
        settings: of the merge, such as `alpha`.
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
        base, promoted: figure -> value.
        reference: what `base` has the figures of: "base", or where the base has no head a rule,
            "constant" for a classifier and "length" for a reward model.
        looks: how often the split has been measured for this run or sweep.
        metric, mode: the figure that decided, and which way is better.
        winner: the promoted candidate; `tied` where a less simple one has a better value, and the
            interval of their difference covers zero.
        differences: figure -> `difference`, promoted minus base, and its `interval`, None where the
            examples are too few.
        candidates: all candidates, on the validation split.
        improved: whether the promoted model is better than the base, zero outside the interval.
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
    """The record of a promotion.

    Args:
        contenders: all candidates on validation, the base first.
        settings: candidate -> the settings of its merge.
        base, promoted: measured on `split`.
    """
    differences = compared(base, promoted)
    held_out = difference(base.scores[verdict.figure], promoted.scores[verdict.figure])
    return Evaluation(
        split=split,
        examples=_examples(base),
        base=base.figures,
        promoted=promoted.figures,
        looks=looks,
        verdict=_sentence(verdict, contenders, base, promoted, held_out, split, reference),
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
        samples=_samples(base, promoted),
        reference=reference,
    )


def score_lines(split: str, name: str, measured: Measured) -> Iterator[str]:
    """Lines of `scores.jsonl`: one object per example with split, candidate, index and figures.

    Figures of another set, such as retention, have that set's name as their split.
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
            if not group and measured.answers is not None and count == measured.answers.count:
                facts["answers"] = list(measured.answers.groups[i].completions)
            values = {
                figure: round(each[i], 6) if math.isfinite(each[i]) else None
                for figure, each in figures.items()
            }
            yield json.dumps(facts | values, ensure_ascii=False) + "\n"


def _samples(base: Measured, promoted: Measured) -> tuple[Sample, ...]:
    """The first prompts with both models' continuations."""
    pairs = zip(base.continuations, promoted.continuations, strict=True)
    return tuple(
        Sample(old.prompt, old.reference, old.generated, new.generated)
        for old, new in list(pairs)[:SAMPLES]
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
    contenders: Sequence[Contender],
    base: Measured,
    promoted: Measured,
    held_out: Difference,
    split: str,
    reference: str,
) -> str:
    figure = verdict.figure
    old, new = base.figures[figure], promoted.figures[figure]
    simpler = f"; {verdict.winner} and {verdict.best} are tied on validation" * verdict.tied
    names = [one.name for one in contenders if not math.isfinite(one.measured.figures[figure])]
    lost = f"; {figure} of {', '.join(names)} is {NOT_FINITE} on validation" * bool(names)
    if verdict.winner == "base":
        count = _count(contenders[0].measured, figure)
        if count < FEWEST_EXAMPLES:
            return f"the base is kept: {_too_few(count)} on validation{lost}"
        return f"the base is kept: no candidate is better on validation{simpler}{lost}"
    how = "tied with" if held_out.covers_zero else "not better than"
    if better(held_out, verdict.mode):
        how = "better than"
    sure = f"{CONFIDENCE:.0%} interval of the difference"
    if held_out.interval is None:
        how, sure = "not distinguishable from", _too_few(_count(base, figure))
        if not math.isfinite(held_out.value):
            sure = "which leaves no difference to measure"
    else:
        sure += f" {interval(held_out.interval)}"
    figures = f"{figure} {number(new)} against {number(old)}, {sure} on {split}"
    return f"promoted is {how} {reference} ({figures}){simpler}{lost}"


def _count(measured: Measured, figure: str) -> int:
    return len(measured.scores[figure].columns[0])


def _too_few(count: int) -> str:
    return f"{count} examples are too few to tell"


@dataclass(frozen=True)
class Contender:
    """A measured candidate.

    Attributes:
        simplicity: 0 is the base; a smaller number is simpler.
        is_model: False for a constant answer, which is compared and never promoted.
    """

    name: str
    simplicity: int
    measured: Measured
    is_model: bool = True


@dataclass(frozen=True)
class Verdict:
    """The decision.

    Attributes:
        figure, mode: what decided, and which way is better.
        winner: the simplest model whose interval to the best one covers zero.
        best: the model with the best value.
        differences: candidate -> its figure minus the best one's, for all but the best.
    """

    figure: str
    mode: Mode
    winner: str
    best: str
    differences: Mapping[str, Difference]

    @property
    def tied(self) -> bool:
        """Whether a simpler candidate than the best one was chosen."""
        return self.winner != self.best


def decide(contenders: Sequence[Contender], figure: str) -> Verdict:
    """Choose among candidates that were measured on the same examples.

    Raises:
        ConfigError: no entry of `promote.metrics` gives `figure`.
        RunFailed: `figure` is not finite for any candidate.
    """
    by_name = {one.name: _scores_of(one, figure) for one in contenders}
    mode = next(iter(by_name.values())).mode
    sign = 1 if mode == "min" else -1
    models = [one for one in contenders if one.is_model]
    usable = [one for one in models if math.isfinite(by_name[one.name].value)]
    if not usable:
        raise RunFailed(f"{figure} is not finite for any candidate")
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
    """Whether a difference is an improvement whose interval excludes zero."""
    return not new.covers_zero and (new.value < 0) == (mode == "min")


def compared(base: Measured, promoted: Measured) -> dict[str, dict[str, Any]]:
    """Figure -> `difference` to the base and its `interval`, for figures that both have.

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
            "is not a figure of promote.metrics",
            f"write one of {', '.join(scores)}",
        )
    return scores[figure]
