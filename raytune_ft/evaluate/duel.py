"""What a model answered against what the base answered to the same prompts: win rates.

Shapes: P prompts, C completions of each, n examples, D bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from raytune_ft.config.metrics import CONTROLLED, DISAGREED, WIN_RATE, of_reward
from raytune_ft.evaluate.answers import Answers, known_means
from raytune_ft.evaluate.scores import Column, Scores
from raytune_ft.records import Tell
from raytune_ft.rewards.base import Group
from raytune_ft.rewards.judge import DISAGREEMENTS
from raytune_ft.rewards.pool import SharedRewards

STEPS, LARGEST_STEP, LARGEST_LOGIT = 60, 2.0, 20.0
PRIOR = 0.01
"""Of the slope alone, so that it is finite where the longer completion always wins."""


@dataclass(frozen=True)
class Duels:
    """The win rates of `promote.metrics`.

    Attributes:
        metrics: all entries of `promote.metrics`.
        judges: the rewards that compare two completions. A win of any other reward is a higher
            score.
    """

    metrics: Sequence[str]
    judges: SharedRewards

    @property
    def rewards(self) -> list[str]:
        """What the rewards are called that have win rates."""
        named = [of_reward(name) for name in self.metrics]
        wanted = [called for kind, called in filter(None, named) if kind in (WIN_RATE, CONTROLLED)]
        return list(dict.fromkeys(wanted))

    def scores(self, base: Answers, model: Answers, tell: Tell) -> dict[str, Scores]:
        """Figures of a model; those of the base itself are 0.5. Tells which replies are missing.

        A completion wins, loses or ties against that of the base of the same number, and the same
        text ties. Where one of the two has no score, the comparison is left out.
        """
        found: dict[str, Scores] = {}
        for called in self.rewards:
            rates = {}
            if called in model.scores_PC:
                won_PC = _by_score(base, model, called)
            else:
                won_PC, split_PC = self._by_judge(base, model, called, tell)
                rates = {f"{DISAGREED}:{called}": Scores.known_mean(known_means(split_PC), "min")}
            won_n = known_means(won_PC)
            if f"{WIN_RATE}:{called}" in self.metrics:
                found[f"{WIN_RATE}:{called}"] = Scores.known_mean(won_n)
            if f"{CONTROLLED}:{called}" in self.metrics:
                longer_PC = np.where(np.isnan(won_PC), np.nan, model.tokens_PC - base.tokens_PC)
                found[f"{CONTROLLED}:{called}"] = controlled(won_n, known_means(longer_PC))
            found |= rates
        return found

    def _by_judge(
        self, base: Answers, model: Answers, called: str, tell: Tell
    ) -> tuple[Column, Column]:
        """`[P, C]` each: what was won, and whether the replies in the two orders disagreed."""
        shape, places = model.tokens_PC.shape, range(len(model.groups))
        pairs = [
            _pair(base.groups[place], model.groups[place], number)
            for place in places
            for number in range(shape[1])
        ]
        with self.judges.serving() as rewards:
            judge = rewards.processes[rewards.names.index(called)]
            scores = [second for _, second in judge.scores(pairs)]
            for note in rewards.notes():
                tell(note)
        won = [np.nan if one.value is None else one.value for one in scores]
        split = [np.nan if one.value is None else one.why == DISAGREEMENTS for one in scores]
        return np.reshape(won, shape), np.reshape(np.array(split, np.float64), shape)


def _pair(base: Group, model: Group, number: int) -> Group:
    """The completions of that number, the base's first."""
    both = (base, model)
    return replace(
        base,
        completions=[one.completions[number] for one in both],
        completion_ids=[one.completion_ids[number] for one in both],
    )


def _by_score(base: Answers, model: Answers, called: str) -> Column:
    gap_PC = model.scores_PC[called] - base.scores_PC[called]
    same_PC = np.array(
        [
            [ours == theirs for ours, theirs in zip(*texts, strict=True)]
            for texts in zip(_texts(model), _texts(base), strict=True)
        ]
    )
    gap_PC[same_PC & ~np.isnan(gap_PC)] = 0.0  # whatever rounding in another batch makes of it
    return (np.sign(gap_PC) + 1) / 2


def _texts(answers: Answers) -> list[Sequence[str]]:
    return [group.completions for group in answers.groups]


def controlled(won_n: Column, longer_n: Column) -> Scores:
    """The win rate at equal length: P(win) at d = 0 in logit P(win) = a + b tanh(d / sd), where d
    is by how many tokens a completion is longer and sd the standard deviation of d (Dubois et al.,
    arXiv 2404.04475, without the term of the instruction). It is fitted again in every draw.

    Args:
        won_n: 1, 0.5 or 0, or a mean of such; NaN where it is not known.
    """
    known = ~np.isnan(won_n)
    columns = tuple(np.where(known, each, 0.0) for each in (won_n, longer_n))
    return Scores(
        (*columns, known.astype(np.float64)), known=None if known.all() else known, fit=_at_no_gap
    )


def _at_no_gap(columns: tuple[Column, ...], counts_DN: Column) -> Column:
    """`[D]`, by Newton's method on all draws at once."""
    won_N, longer_N, known_N = columns
    weights_DN = counts_DN * known_N
    total_D1 = weights_DN.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_D1 = (weights_DN @ longer_N)[:, None] / total_D1
        spread_D1 = np.sqrt(
            np.maximum(weights_DN @ longer_N**2, 0)[:, None] / total_D1 - mean_D1**2
        )
        x_DN = np.where(spread_D1 > 0, np.tanh(longer_N / spread_D1), 0.0)
    a_D, b_D = np.zeros((2, len(counts_DN)))
    for _ in range(STEPS):
        share_DN = 1 / (1 + np.exp(-(a_D[:, None] + b_D[:, None] * x_DN)))
        rest_DN = weights_DN * (won_N - share_DN)
        slope_a, slope_b = rest_DN.sum(1), (rest_DN * x_DN).sum(1) - PRIOR * b_D
        curve_DN = weights_DN * share_DN * (1 - share_DN)
        aa, ab = curve_DN.sum(1) + 1e-12, (curve_DN * x_DN).sum(1)
        bb = (curve_DN * x_DN**2).sum(1) + PRIOR
        size = np.maximum(aa * bb - ab**2, 1e-12)
        step_a = np.clip((bb * slope_a - ab * slope_b) / size, -LARGEST_STEP, LARGEST_STEP)
        step_b = np.clip((aa * slope_b - ab * slope_a) / size, -LARGEST_STEP, LARGEST_STEP)
        before_2D = np.stack([a_D, b_D])
        a_D = np.clip(a_D + step_a, -LARGEST_LOGIT, LARGEST_LOGIT)
        b_D = np.clip(b_D + step_b, -LARGEST_LOGIT, LARGEST_LOGIT)
        if np.abs(np.stack([a_D, b_D]) - before_2D).max() < 1e-9:
            break
    return np.where(total_D1[:, 0] > 0, 1 / (1 + np.exp(-a_D)), np.nan)
