"""What a completion and each of its tokens are credited with, from the rewards of a rollout.

An objective that learns from what a model says names its way in `config.objectives.OBJECTIVES`.

Shapes: P prompts, G completions of each, E of them all, N tokens of all completions, T tokens of
the longest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from raytune_ft.config.train import TrainConfig
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.data.prepared import REFERENCE
from raytune_ft.data.split import PARTS, TokenizedSplit
from raytune_ft.model.objectives.base import WEIGHT
from raytune_ft.model.objectives.policy import (
    ADVANTAGE,
    COUNTED,
    IMPORTANCE,
    SAMPLED,
    needs_sampled,
    weighs_copies,
)
from raytune_ft.model.objectives.ppo import RETURN, VALUE
from raytune_ft.train.speaker import (
    Answered,
    Numbers,
    Speaker,
    logps_of_copies,
    mean_of,
    split_of_said,
)

Flags = npt.NDArray[np.bool_]

NO_SPREAD = 1e-4
"""Added to standard deviations of rewards, as in TRL."""
NO_VARIANCE = 1e-8
"""Added to the variance of advantages in whitening, as in TRL."""


@dataclass(frozen=True)
class Learnt:
    """What steps are trained on.

    Attributes:
        split: the same number of examples for every prompt.
        advantages_PG: of each completion, for `rollouts.jsonl`.
        figures: for the metrics of each step.
    """

    split: TokenizedSplit
    advantages_PG: Numbers
    figures: Mapping[str, float]


class Credit(Protocol):
    """The way of one objective from scored completions to examples.

    `lacking`: what has no two different rewards where `teaches` is False.
    """

    lacking: ClassVar[str]

    def __init__(self, train: TrainConfig, speaker: Speaker) -> None: ...

    def assign(
        self, prompts: Sequence[Prompt], answered: Answered, weights_P: Numbers | None
    ) -> Learnt:
        """Every rank calls this at once, and gets the same."""

    def teaches(self, totals_PG: Numbers) -> bool:
        """Whether there is anything to learn from these rewards."""


def kept_labels(split: TokenizedSplit, kept_E: Flags) -> tuple[Flags, Flags]:
    """The label mask with that of some examples alone, and which label tokens are left."""
    owners = np.repeat(np.arange(len(split)), split.lengths)
    mask = split.label_mask & kept_E[owners]
    return mask, mask[split.label_mask]


def advantages_of(
    totals_PG: Numbers, scale: str, excluded_P: Flags | None = None
) -> tuple[Numbers, Flags]:
    """`[P, G]` advantages, and which completions take part.

    A completion without a reward, NaN, has no part in its group's mean and the advantage 0. A group
    with under two rewards, or one that is `excluded`, takes no part at all. `scale` divides by the
    standard deviation over a group or over all ("batch"), plus `NO_SPREAD`; or by nothing.
    """
    known_PG = ~np.isnan(totals_PG)
    counts_P1 = known_PG.sum(1, keepdims=True)
    filled_PG = np.where(known_PG, totals_PG, 0.0)
    means_P1 = filled_PG.sum(1, keepdims=True) / np.maximum(counts_P1, 1)
    apart_PG = np.where(known_PG, totals_PG - means_P1, 0.0)
    if scale == "group":
        spread = np.sqrt((apart_PG**2).sum(1, keepdims=True) / np.maximum(counts_P1 - 1, 1))
        apart_PG = apart_PG / (spread + NO_SPREAD)
    elif scale == "batch":
        known = totals_PG[known_PG]
        spread_of_all = known.std(ddof=1) if len(known) > 1 else 0.0
        apart_PG = apart_PG / (spread_of_all + NO_SPREAD)
    taking_P1 = counts_P1 > 1
    if excluded_P is not None:
        taking_P1 = taking_P1 & ~excluded_P[:, None]
    return np.where(taking_P1, apart_PG, 0.0), np.broadcast_to(taking_P1, totals_PG.shape)


def same_of(totals_PG: Numbers) -> Flags:
    """`[P]`, whether the known rewards of a group are all equal."""
    highest = np.where(np.isnan(totals_PG), -np.inf, totals_PG).max(1)
    lowest = np.where(np.isnan(totals_PG), np.inf, totals_PG).min(1)
    return np.asarray(highest <= lowest)


class GroupAdvantages(Credit):
    """GRPO: every completion, by how much better it is than the others to its prompt."""

    lacking = "no group"

    def __init__(self, train: TrainConfig, speaker: Speaker) -> None:
        self._grpo, self._rollout, self._speaker = train.grpo, train.rollout, speaker

    def assign(
        self, prompts: Sequence[Prompt], answered: Answered, weights_P: Numbers | None
    ) -> Learnt:
        """Advantages of completions, and what a KL term and ratios read of tokens."""
        grpo, totals_PG, speaker = self._grpo, answered.totals_PG, self._speaker
        split = split_of_said(prompts, answered.said, weights_P)
        temperature = self._rollout.temperature
        labels: dict[str, Numbers] = {}
        if needs_sampled(grpo, self._rollout):
            labels[SAMPLED] = speaker.logps(split, temperature)
        if weighs_copies(grpo, self._rollout):
            ahead_N = labels[SAMPLED] - logps_of_copies(answered.flat, split)
            most = grpo.vllm_importance_sampling_clip_max
            assert most is not None
            labels[IMPORTANCE] = np.exp(ahead_N).clip(max=most)
        if grpo.beta:
            labels[REFERENCE] = speaker.base_logps(split, temperature)
        if grpo.beta and grpo.kl == "reward":
            drift_N = labels[SAMPLED] - labels.pop(REFERENCE)
            drift_E = summed_by_example(drift_N, split)
            totals_PG = totals_PG - grpo.beta * drift_E.reshape(totals_PG.shape)
        excluded_P = np.zeros(len(totals_PG), np.bool_)
        if grpo.drop_zero_std:
            excluded_P |= same_of(totals_PG)
        if grpo.gate is not None:
            gate = [[scores[grpo.gate] for scores in group] for group in answered.scores]
            excluded_P |= same_of(np.array(gate, dtype=np.float64))
        advantages_PG, taking_PG = advantages_of(totals_PG, grpo.scale_rewards, excluded_P)
        taking_E = taking_PG.reshape(-1)
        kept_E = taking_E
        if grpo.mask_truncated_completions:
            kept_E = taking_E & np.array([one.ended for one in answered.flat])
        columns = {
            ADVANTAGE: advantages_PG.reshape(-1, 1),
            COUNTED: taking_E.reshape(-1, 1).astype(np.float64),
        }
        return Learnt(
            with_columns(split, kept_E, columns, labels), advantages_PG, share_of_same(answered)
        )

    def teaches(self, totals_PG: Numbers) -> bool:
        """A KL term teaches something by itself."""
        return self._grpo.beta > 0 or not same_of(totals_PG).all()


class BestAgainstWorst(Credit):
    """Online DPO: the best completion of each prompt against the worst, the first of equals. A tie,
    and a prompt with under two scores, has the weight 0.
    """

    lacking = "no group"

    def __init__(self, train: TrainConfig, speaker: Speaker) -> None:
        self._speaker = speaker

    def assign(
        self, prompts: Sequence[Prompt], answered: Answered, weights_P: Numbers | None
    ) -> Learnt:
        """Pairs for the losses of DPO. The advantages are 1 for chosen and -1 for rejected."""
        totals_PG = answered.totals_PG
        known_PG = ~np.isnan(totals_PG)
        best_P = np.where(known_PG, totals_PG, -np.inf).argmax(1)
        worst_P = np.where(known_PG, totals_PG, np.inf).argmin(1)
        tied_P = same_of(totals_PG)
        best_P, worst_P = np.where(tied_P, 0, best_P), np.where(tied_P, 1, worst_P)
        chosen = list(zip(answered.said, best_P.tolist(), worst_P.tolist(), strict=True))
        flat = split_of_said(prompts, [(group[one], group[other]) for group, one, other in chosen])
        own_P = np.ones(len(prompts)) if weights_P is None else weights_P
        split = replace(
            flat,
            offsets=flat.offsets[::2],
            columns={
                PARTS: flat.lengths.reshape(-1, 2).astype(np.float32),
                WEIGHT: np.where(tied_P, 0.0, own_P)[:, None].astype(np.float32),
            },
        )
        logps_N: Any = self._speaker.base_logps(split, 1.0)
        signs_PG = np.zeros(totals_PG.shape)
        rows = np.arange(len(prompts))[~tied_P]
        signs_PG[rows, best_P[~tied_P]], signs_PG[rows, worst_P[~tied_P]] = 1, -1
        return Learnt(
            replace(split, label_columns={REFERENCE: logps_N}), signs_PG, share_of_same(answered)
        )

    def teaches(self, totals_PG: Numbers) -> bool:
        """A prompt has two different rewards."""
        return not bool(same_of(totals_PG).all())


class TokenAdvantages(Credit):
    """PPO: every token, by how much better the completion went on than the critic expected."""

    lacking = "none"

    def __init__(self, train: TrainConfig, speaker: Speaker) -> None:
        self._ppo, self._rollout, self._speaker = train.ppo, train.rollout, speaker

    def assign(
        self, prompts: Sequence[Prompt], answered: Answered, weights_P: Numbers | None
    ) -> Learnt:
        """Advantages and returns of tokens under the policy that sampled. A completion without a
        score is left out.

        The reward of a token is `-kl_coef` times its log-probability minus that under the model
        before training; the last token also has the score of its completion.
        """
        ppo, speaker, temperature = self._ppo, self._speaker, self._rollout.temperature
        split = split_of_said(prompts, answered.said, weights_P)
        totals_E = answered.totals_PG.reshape(-1)
        known_E = ~np.isnan(totals_E)
        logps_N, values_N = speaker.logps_and_values(split, temperature)
        drift_N = np.zeros_like(logps_N)
        if ppo.kl_coef:
            drift_N = logps_N - speaker.base_logps(split, temperature)
        counts_E = split.label_counts
        rewards_N = token_rewards(np.where(known_E, totals_E, 0.0), drift_N, counts_E, ppo.kl_coef)
        advantages_N = gae(rewards_N, values_N, counts_E, ppo.gamma, ppo.lam)
        returns_N = advantages_N + values_N
        kept_N = np.repeat(known_E, counts_E)
        weights_N = kept_N.astype(np.float64)
        if WEIGHT in split.columns:
            weights_N = weights_N * np.repeat(split.columns[WEIGHT][:, 0], counts_E)
        figures = {"explained_variance": explained_variance(values_N, returns_N, weights_N)}
        if ppo.kl_coef:
            figures["kl"] = float(drift_N.sum() / len(split))
        if ppo.whiten_advantages:
            advantages_N = whitened(advantages_N, weights_N)
        labels = {
            SAMPLED: logps_N,
            ADVANTAGE: advantages_N,
            VALUE: values_N,
            RETURN: returns_N,
        }
        means_E = summed_by_example(np.where(kept_N, advantages_N, 0.0), split)
        means_E = means_E / np.maximum(counts_E, 1)
        return Learnt(
            with_columns(split, known_E, {}, labels),
            means_E.reshape(answered.totals_PG.shape),
            figures,
        )

    def teaches(self, totals_PG: Numbers) -> bool:
        """A KL term teaches something by itself."""
        return self._ppo.kl_coef > 0 or not bool(same_of(totals_PG.reshape(1, -1)).all())


def token_rewards(
    scores_E: Numbers, drift_N: Numbers, counts_E: npt.NDArray[np.int64], kl_coef: float
) -> Numbers:
    """`[N]`: `-kl_coef` times the log ratio of each token, and the score on the last one of each
    completion; completions of `counts_E` tokens lie end to end.
    """
    rewards_N, there_E = -kl_coef * drift_N, counts_E > 0
    rewards_N[np.cumsum(counts_E)[there_E] - 1] += scores_E[there_E]
    return rewards_N


def gae(
    rewards_N: Numbers,
    values_N: Numbers,
    counts_E: npt.NDArray[np.int64],
    gamma: float,
    lam: float,
) -> Numbers:
    """`[N]` generalised advantages (arXiv 1506.02438, eq. 16) of completions that lie end to end.

    The sum over k of (gamma lam)^k delta_{t+k}, with delta_t = r_t + gamma V_{t+1} - V_t and V = 0
    after the last token, whether a completion ended or was cut.
    """
    longest = int(counts_E.max(initial=0))
    there_ET = np.arange(longest) < counts_E[:, None]
    values_ET, rewards_ET = np.zeros((2, len(counts_E), longest + 1))
    values_ET[:, :-1][there_ET], rewards_ET[:, :-1][there_ET] = values_N, rewards_N
    found_ET = np.zeros((len(counts_E), longest + 1))
    for t in reversed(range(longest)):
        delta_E = rewards_ET[:, t] + gamma * values_ET[:, t + 1] - values_ET[:, t]
        found_ET[:, t] = delta_E + gamma * lam * found_ET[:, t + 1]
    found_N: Numbers = found_ET[:, :-1][there_ET]
    return found_N


def whitened(values_N: Numbers, weights_N: Numbers) -> Numbers:
    """With the weighted mean 0 and, but for `NO_VARIANCE`, the weighted variance 1."""
    total = weights_N.sum()
    if not total:
        return values_N
    apart_N = values_N - (weights_N * values_N).sum() / total
    spread = np.sqrt((weights_N * apart_N**2).sum() / total + NO_VARIANCE)
    return np.asarray(apart_N / spread)


def explained_variance(values_N: Numbers, returns_N: Numbers, weights_N: Numbers) -> float:
    """The share of the variance of returns that the critic knew beforehand; NaN without any."""
    total = weights_N.sum()

    def variance(numbers_N: Numbers) -> float:
        apart_N = numbers_N - (weights_N * numbers_N).sum() / total
        return float((weights_N * apart_N**2).sum() / total)

    of_all = variance(returns_N) if total else 0.0
    return 1 - variance(returns_N - values_N) / of_all if of_all else float("nan")


def summed_by_example(values_N: Numbers, split: TokenizedSplit) -> Numbers:
    """`[E]` sums over the label tokens of each example."""
    owners_N = np.repeat(np.arange(len(split)), split.label_counts)
    return np.asarray(np.bincount(owners_N, values_N, len(split)), np.float64)


def with_columns(
    split: TokenizedSplit,
    kept_E: Flags,
    columns: Mapping[str, Numbers],
    labels: Mapping[str, Numbers],
) -> TokenizedSplit:
    """The split with further columns `[E, 1]` and label columns `[N]`, float64; the tokens of
    completions that are not `kept` are no labels.
    """
    mask, left = kept_labels(split, kept_E)
    return TokenizedSplit(
        split.input_ids,
        mask,
        split.offsets,
        columns={**split.columns, **columns},  # type: ignore[dict-item]
        label_columns={name: values[left] for name, values in labels.items()},  # type: ignore[misc]
    )


def share_of_same(answered: Answered) -> dict[str, float]:
    """The share of prompts whose completions all have the same reward."""
    return {"same_rewards": mean_of(same_of(answered.totals_PG).astype(np.float64))}
