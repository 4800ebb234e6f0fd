"""Objectives over pairs of answers: DPO and its family, ORPO and SimPO.

Shapes: E pairs, Q sequences (two a pair), N label tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from raytune_ft.config.preference import DpoConfig, OrpoConfig, SimpoConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.prepared import REFERENCE, PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import RunFailed
from raytune_ft.model.objectives.base import (
    Columns,
    Forward,
    OfLogps,
    TeacherOf,
    weighted_examples,
    weighted_losses,
)
from raytune_ft.model.objectives.tokens import token_losses


def label_logps(forward: Forward, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """`[N]`, the log-probability of every label token, float32 or wider."""
    return forward.by_label(batch, logps_of(temperature))[:, 0]


def logps_of(temperature: float) -> Callable[[Tensor, MicroBatch], Tensor]:
    """From `logits_bV` of label tokens to their log-probabilities `[b, 1]`."""
    return lambda logits_bV, part: -token_losses(logits_bV / temperature, part).unsqueeze(1)


@dataclass(frozen=True)
class Answers:
    """What the loss of pairs is computed from, `[E]` float64 each.

    Attributes:
        chosen, rejected: log-probabilities of the answers.
        chosen_ratio, rejected_ratio: the same minus those under the reference; without a reference
            the same.
        chosen_tokens, rejected_tokens: lengths of the answers.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_ratio: Tensor
    rejected_ratio: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @classmethod
    def of(cls, logps_N: Tensor, batch: MicroBatch, tail: float | None = None) -> Answers:
        """Sums over the answers of a batch. In ratios, tokens of the longer answer of a pair that
        lie behind the end of the shorter one count `tail` times (LD-DPO, arXiv 2409.06411); None
        is 1.
        """
        members_PE, owners_N = batch.members_PE, batch.owners_N
        assert members_PE is not None
        spans = len(batch.spans)
        tokens_Q = torch.zeros(spans, dtype=torch.float64, device=logps_N.device)
        tokens_Q.index_add_(0, owners_N, torch.ones_like(logps_N, dtype=torch.float64))
        reference_N = batch.label_columns.get(REFERENCE)
        wide_N = logps_N.double()
        ratio_N = wide_N if reference_N is None else wide_N - reference_N.double()
        if tail is not None:
            shared_E = torch.minimum(*tokens_Q[members_PE])
            shared_Q = torch.empty_like(tokens_Q).index_copy_(
                0, members_PE.reshape(-1), shared_E.repeat(2)
            )
            begins_Q = tokens_Q.cumsum(0) - tokens_Q
            places_N = torch.arange(len(logps_N), device=logps_N.device) - begins_Q[owners_N]
            factor_N = torch.where(places_N < shared_Q[owners_N], 1.0, tail)
            ratio_N = ratio_N * factor_N

        def sums(values_N: Tensor) -> Tensor:
            sums_Q = torch.zeros(spans, dtype=torch.float64, device=values_N.device)
            return sums_Q.index_add(0, owners_N, values_N)[members_PE]

        return cls(*sums(wide_N), *sums(ratio_N), *tokens_Q[members_PE])


def half_right(chosen_E: Tensor, rejected_E: Tensor) -> Tensor:
    """`[E]`, 1 where the chosen answer has the higher reward. Equal rewards are half right, so that
    a model that is still its reference is right in half of the pairs.
    """
    return (1 + (chosen_E - rejected_E).sign()) / 2


PairLoss = Callable[[Answers, DpoConfig], Tensor]
"""Losses `[E]` of pairs."""


def _scores(answers: Answers, dpo: DpoConfig) -> tuple[Tensor, Tensor]:
    """f'(ratio) of both answers (f-DPO, arXiv 2309.16240), which under reverse KL is log ratio."""

    def score(log_ratio: Tensor) -> Tensor:
        if dpo.f_divergence_type == "forward_kl":
            return 1 - torch.exp((-log_ratio).clamp_max(LARGEST_EXPONENT))
        if dpo.f_divergence_type == "js_divergence":
            return math.log(2) + F.logsigmoid(log_ratio)
        power = dpo.f_alpha_divergence_coef - 1
        if dpo.f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
            return torch.expm1((power * log_ratio).clamp_max(LARGEST_EXPONENT)) / power
        return log_ratio

    return score(answers.chosen_ratio), score(answers.rejected_ratio)


LARGEST_EXPONENT = 80.0
"""Keeps exponentials finite in float32, as TRL does in the alpha divergence."""


def _delta(answers: Answers, dpo: DpoConfig) -> Tensor:
    chosen, rejected = _scores(answers, dpo)
    return dpo.beta * (chosen - rejected)


def _mean_delta(answers: Answers, dpo: DpoConfig) -> Tensor:
    """The difference of scores per token of the answers."""
    chosen, rejected = _scores(answers, dpo)
    return chosen / answers.chosen_tokens - rejected / answers.rejected_tokens


def sigmoid(answers: Answers, dpo: DpoConfig) -> Tensor:
    """DPO (arXiv 2305.18290)."""
    return -F.logsigmoid(_delta(answers, dpo))


def hinge(answers: Answers, dpo: DpoConfig) -> Tensor:
    """SLiC's hinge (arXiv 2305.10425) on DPO's margin (RSO, arXiv 2309.06657)."""
    return torch.relu(1 - _delta(answers, dpo))


def ipo(answers: Answers, dpo: DpoConfig) -> Tensor:
    """IPO (arXiv 2310.12036), per token as its authors use it."""
    return (_mean_delta(answers, dpo) - 1 / (2 * dpo.beta)).square()


def robust(answers: Answers, dpo: DpoConfig) -> Tensor:
    """Robust DPO (arXiv 2403.00409); `label_smoothing` is the share of flipped pairs."""
    delta, flipped = _delta(answers, dpo), dpo.label_smoothing
    right, wrong = -F.logsigmoid(delta), -F.logsigmoid(-delta)
    return ((1 - flipped) * right - flipped * wrong) / (1 - 2 * flipped)


def exo_pair(answers: Answers, dpo: DpoConfig) -> Tensor:
    """EXO for two answers (arXiv 2402.00856, eq. 16)."""
    delta, smoothing = _delta(answers, dpo), dpo.label_smoothing
    chosen = delta.sigmoid() * (F.logsigmoid(delta) - math.log1p(-smoothing))
    return chosen + (-delta).sigmoid() * (F.logsigmoid(-delta) - math.log(smoothing))


def nca_pair(answers: Answers, dpo: DpoConfig) -> Tensor:
    """NCA for two answers (arXiv 2402.05369)."""
    chosen, rejected = dpo.beta * answers.chosen_ratio, dpo.beta * answers.rejected_ratio
    against = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -F.logsigmoid(chosen) - 0.5 * against


def bco_pair(answers: Answers, dpo: DpoConfig) -> Tensor:
    """BCO for pairs (arXiv 2404.04656), without its shift."""
    chosen, rejected = dpo.beta * answers.chosen_ratio, dpo.beta * answers.rejected_ratio
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(answers: Answers, dpo: DpoConfig) -> Tensor:
    """SPPO (arXiv 2405.00675) with probabilities 1 and 0."""
    half = 0.5 / dpo.beta
    return (answers.chosen_ratio - half).square() + (answers.rejected_ratio + half).square()


def apo_zero(answers: Answers, dpo: DpoConfig) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7): the chosen answer gains, the rejected one loses."""
    chosen, rejected = dpo.beta * answers.chosen_ratio, dpo.beta * answers.rejected_ratio
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def apo_down(answers: Answers, dpo: DpoConfig) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): both lose, the rejected one more."""
    chosen, rejected = dpo.beta * answers.chosen_ratio, dpo.beta * answers.rejected_ratio
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


def discopop(answers: Answers, dpo: DpoConfig) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, eq. 5)."""
    delta = _delta(answers, dpo)
    share = (delta / dpo.discopop_tau).sigmoid()
    exponential = torch.exp((-delta).clamp_max(LARGEST_EXPONENT))
    return -F.logsigmoid(delta) * (1 - share) + exponential * share


def sigmoid_norm(answers: Answers, dpo: DpoConfig) -> Tensor:
    """DPO with log ratios per token (arXiv 2411.15124, sec. 5.1.2)."""
    return -F.logsigmoid(dpo.beta * _mean_delta(answers, dpo))


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
}
"""The values of `train.dpo.loss_type`, by TRL's names; `sft` is the likelihood of the answer."""


@dataclass(frozen=True)
class PairObjective(OfLogps):
    """A loss for each pair, from the log-probabilities of both answers.

    A term on the likelihood of chosen answers is a mean over the tokens of the whole step, as in a
    supervised run, and so does not depend on how a step is cut into micro-batches.
    `pairs_per_token` are the step's pairs over the tokens of their chosen answers, both weighted.
    """

    of_tokens: ClassVar[bool] = True
    pairs_per_token: float = 1.0

    def of(self, answers: Answers) -> Tensor:
        """`[E]`, the losses without weights."""
        raise NotImplementedError

    def rewards(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """`[E]` each: the reward that a model implies of the chosen and of the rejected answers."""
        raise NotImplementedError

    def answers(self, logps_N: Tensor, batch: MicroBatch) -> Answers:
        """See `Answers.of`."""
        return Answers.of(logps_N, batch)

    def likelihood(self, answers: Answers) -> Tensor:
        """`[E]`, the share of each pair in the mean loss of the tokens of chosen answers."""
        return -answers.chosen * self.pairs_per_token

    def over(self, split: TokenizedSplit, indices: Indices, forward: Forward) -> PairObjective:
        chosen_E = split.part_labels_of(np.asarray(indices) * split.parts)
        weights_E = self.known(split, indices)["counted"]
        tokens = float((weights_E * chosen_E).sum())
        return replace(self, pairs_per_token=float(weights_E.sum()) / (tokens or 1.0))

    def losses(self, forward: Forward, batch: MicroBatch) -> Tensor:
        """`[E]`, one for each pair, float64."""
        return self.losses_of(label_logps(forward, batch), batch)

    def losses_of(self, logps_N: Tensor, batch: MicroBatch) -> Tensor:
        return weighted_losses(self.of(self.answers(logps_N, batch)), batch.columns)

    def columns(self, forward: Forward, batch: MicroBatch, groups: int) -> Columns:
        """See `columns_of`; all models have this objective."""
        logps_N = label_logps(forward, batch)
        found = self.columns_of(logps_N, batch)
        return Columns(examples={name: each.view(groups, -1) for name, each in found.items()})

    def columns_of(self, logps_N: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """`[E]` each, by the rewards that the model implies."""
        answers = self.answers(logps_N, batch)
        chosen, rejected = self.rewards(answers)
        return {
            "loss": self.losses_of(logps_N, batch),
            "preferred": half_right(chosen, rejected),
            "margin": chosen - rejected,
            "chosen_logps": answers.chosen,
            "rejected_logps": answers.rejected,
        }

    def known(self, split: TokenizedSplit, indices: Indices) -> dict[str, npt.NDArray[Any]]:
        """See `weighted_examples`."""
        return weighted_examples(split, indices)


@dataclass(frozen=True, kw_only=True)
class Dpo(PairObjective):
    """Losses on log ratios to a reference, whose log-probabilities come with the data."""

    settings: DpoConfig

    def of(self, answers: Answers) -> Tensor:
        total = torch.zeros_like(answers.chosen)
        for name, weight in zip(self.settings.losses, self.settings.weights, strict=True):
            if name == "sft":
                total = total + weight * self.likelihood(answers)
            else:
                total = total + weight * PAIR_LOSSES[name](answers, self.settings)
        return total

    def answers(self, logps_N: Tensor, batch: MicroBatch) -> Answers:
        """See `Answers.of`. Raises RunFailed where the data lack the reference."""
        if REFERENCE not in batch.label_columns:
            raise RunFailed("the data hold no log-probabilities of the reference")
        return Answers.of(logps_N, batch, self.settings.ld_alpha)

    def rewards(self, answers: Answers) -> tuple[Tensor, Tensor]:
        return (
            self.settings.beta * answers.chosen_ratio,
            self.settings.beta * answers.rejected_ratio,
        )


@dataclass(frozen=True, kw_only=True)
class Orpo(PairObjective):
    """Likelihood of the chosen answer plus beta times the odds ratio loss (arXiv 2403.07691)."""

    settings: OrpoConfig

    def of(self, answers: Answers) -> Tensor:
        chosen, rejected = _means(answers)
        odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
        return self.likelihood(answers) - self.settings.beta * F.logsigmoid(odds)

    def rewards(self, answers: Answers) -> tuple[Tensor, Tensor]:
        chosen, rejected = _means(answers)
        return self.settings.beta * chosen, self.settings.beta * rejected


@dataclass(frozen=True, kw_only=True)
class Simpo(PairObjective):
    """SimPO (arXiv 2405.14734); with `cpo_alpha` also the likelihood of the chosen answer."""

    settings: SimpoConfig

    def of(self, answers: Answers) -> Tensor:
        chosen, rejected = self.rewards(answers)
        losses_E = -F.logsigmoid(chosen - rejected - self.settings.simpo_gamma)
        if not self.settings.cpo_alpha:
            return losses_E
        return losses_E + self.settings.cpo_alpha * self.likelihood(answers)

    def rewards(self, answers: Answers) -> tuple[Tensor, Tensor]:
        chosen, rejected = _means(answers)
        return self.settings.beta * chosen, self.settings.beta * rejected


def _means(answers: Answers) -> tuple[Tensor, Tensor]:
    """Log-probabilities per token."""
    return answers.chosen / answers.chosen_tokens, answers.rejected / answers.rejected_tokens


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0 (Maechler, 2012); of 0 as of the nearest number below."""
    x = x.clamp_max(-torch.finfo(x.dtype).tiny)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def dpo(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Dpo:
    """`train.objective: dpo`."""
    return Dpo(settings=train.dpo)


def orpo(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Orpo:
    """`train.objective: orpo`."""
    return Orpo(settings=train.orpo)


def simpo(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Simpo:
    """`train.objective: simpo`."""
    return Simpo(settings=train.simpo)
