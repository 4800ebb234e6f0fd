"""The sections of `train` for objectives that learn from preferences; names as in TRL."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_ft.config.section import Section

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "sft",
]
Above0 = Annotated[float, Field(gt=0)]


class DpoConfig(Section):
    """Direct preference optimisation and its family."""

    loss_type: LossType | Annotated[list[LossType], Field(min_length=1)] = Field(
        "sigmoid", description="the loss of a pair, or a list of losses that are added up"
    )
    loss_weights: list[Above0] | None = Field(
        None, description="a factor for each loss of a list; null is 1 for each"
    )
    beta: Above0 = Field(
        0.1, description="how strongly the model is held to its reference; of ipo, tau"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="robust and exo_pair: the share of pairs that are taken to be flipped"
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        Field("reverse_kl", description="the divergence from the reference that is held small")
    )
    f_alpha_divergence_coef: float = Field(0.5, description="alpha_divergence: its alpha")
    discopop_tau: Above0 = Field(0.05, description="discopop: its temperature")
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="weight of the tokens of an answer behind the end of the shorter one of its "
        "pair; null is 1",
    )
    reference: str | None = Field(
        None,
        min_length=1,
        description="the model that the trained one is held to, a directory or hub id; null is "
        "model.path",
    )

    @property
    def losses(self) -> list[str]:
        """The names of the losses."""
        return [self.loss_type] if isinstance(self.loss_type, str) else [*self.loss_type]

    @property
    def weights(self) -> list[float]:
        """A factor for each loss."""
        return self.loss_weights or [1.0] * len(self.losses)


class OrpoConfig(Section):
    """Odds ratio preference optimisation, which needs no reference."""

    beta: Above0 = Field(0.1, description="weight of the odds ratio beside the likelihood")


class SimpoConfig(Section):
    """Simple preference optimisation, which needs no reference."""

    beta: Above0 = Field(2.0, description="factor of the mean log-probability of an answer")
    simpo_gamma: Annotated[float, Field(ge=0)] = Field(
        0.5, description="the margin of rewards that is aimed at"
    )
    cpo_alpha: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the likelihood of the chosen answer"
    )


class KtoConfig(Section):
    """Kahneman-Tversky optimisation, from answers that are desirable or not."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto", description="apo_zero_unpaired needs no KL"
    )
    beta: Above0 = Field(0.1, description="how strongly the model is held to its reference")
    desirable_weight: Above0 = Field(1.0, description="of the losses of desirable answers")
    undesirable_weight: Above0 = Field(1.0, description="of the losses of the others")


class RewardModelConfig(Section):
    """A reward model: one number for an answer, by Bradley and Terry."""

    center_rewards_coefficient: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the square of a pair's summed rewards, which holds them near 0"
    )
