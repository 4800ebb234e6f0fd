"""The `train` section: how weights move."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.preference import (
    DpoConfig,
    KtoConfig,
    OrpoConfig,
    RewardModelConfig,
    SimpoConfig,
)
from raytune_ft.config.rollouts import GrpoConfig, PpoConfig, RolloutConfig
from raytune_ft.config.section import Fraction, NameIn, Positive, Section


class EarlyStopping(Section):
    """Stop when evaluations no longer improve."""

    patience: Positive = Field(3, description="evaluations in a row without an improvement")
    min_delta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="an evaluation counts as an improvement if it is better by more than this"
    )


class KdConfig(Section):
    """Knowledge distillation: a teacher's distribution over tokens is learnt beside the labels."""

    teacher: str = Field(min_length=1, description="a model directory or hub id")
    divergence: Literal["forward", "reverse"] = Field(
        "forward", description="KL(teacher || student), or KL(student || teacher)"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of both distributions; the divergence is multiplied by its square"
    )
    weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="of the divergence; the loss on labels has 1 - weight"
    )
    cache: Literal["memory", "disk"] = Field(
        "memory",
        description="memory: every worker holds the teacher and runs it; disk: it runs once "
        "before workers start, and they read its logits from a file",
    )
    cache_limit_gib: Annotated[float, Field(gt=0)] = Field(
        64.0, description="cache: disk; a larger file is refused before the teacher runs"
    )


class TrainConfig(Section):
    """How weights move."""

    objective: Annotated[str, NameIn(OBJECTIVES)] = Field(
        "sft", description="what is optimised; see docs/objectives.md"
    )
    batch_size: Positive = Field(16, description="examples per optimizer step, over the whole job")
    lr: Annotated[float, Field(gt=0)] = Field(
        2.0e-4,
        description="peak learning rate; where it is not written, preferences and rollouts have "
        "a smaller one, see docs/preferences.md and docs/rollouts.md",
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_fraction: Fraction = Field(
        0.0, description="share of the steps that raise lr linearly from 0"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="decoupled, as in AdamW; of matrices, not of norms and biases"
    )
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1.0e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="clip gradients to this global norm; null does not clip"
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="budget in passes over train; with max_examples too, the smaller one"
    )
    max_examples: Positive | None = Field(
        None, description="budget in examples; with neither key written it is one epoch"
    )
    eval_every_examples: Positive = Field(
        1000, description="evaluate at the first step at or past each multiple, and at the end"
    )
    early_stopping: EarlyStopping | None = None
    precision: Literal["float32", "bfloat16", "float64"] = Field(
        "bfloat16", description="compute precision; float64 is for verification"
    )
    deterministic: bool = Field(
        False,
        description="on a GPU, the same layout gives the same bits: algorithms that do so alone, "
        "which are slower; a CPU does so without it",
    )
    micro_tokens: Literal["auto"] | Positive = Field(
        "auto",
        description="tokens of one forward pass on one worker, padding included; auto: as many as "
        "are of use and fit into memory, by the estimate of plan",
    )
    label_smoothing: Fraction = Field(
        0.0, description="in the loss on tokens and single labels; evaluations have none"
    )
    neftune_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="size of the noise on embeddings (NEFTune, arXiv 2310.05914); evaluations have "
        "none",
    )
    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(ge=0)]] = Field(
        "none",
        description="classification: of labels in the loss; balanced: inverse to their frequency",
    )
    rationale_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="rationale: of the loss on rationales; the loss on answers has 1"
    )
    kd: KdConfig | None = Field(None, description="objective: kd; its teacher")
    dpo: DpoConfig = Field(DpoConfig(), description="objectives dpo and online_dpo")
    orpo: OrpoConfig = Field(OrpoConfig(), description="objective: orpo")
    simpo: SimpoConfig = Field(SimpoConfig(), description="objective: simpo")
    kto: KtoConfig = Field(KtoConfig(), description="objective: kto")
    reward: RewardModelConfig = Field(RewardModelConfig(), description="objective: reward")
    rollout: RolloutConfig = Field(
        RolloutConfig(), description="grpo, online_dpo, ppo and train.watch: what is sampled"
    )
    watch: list[str] = Field(
        default_factory=list,
        description="names of `rewards` that score what the model says to the validation prompts, "
        "in every evaluation, and are never trained on",
    )
    grpo: GrpoConfig = Field(GrpoConfig(), description="objective: grpo")
    ppo: PpoConfig = Field(PpoConfig(), description="objective: ppo")
