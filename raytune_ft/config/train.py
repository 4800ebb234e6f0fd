"""The `train` section: how weights move."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.section import Fraction, NameIn, Positive, Section


class EarlyStopping(Section):
    """Stop when the evaluation has not improved."""

    patience: Positive = Field(3, description="evaluations in a row without improvement")
    min_delta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="an improvement is larger than this"
    )


class KdConfig(Section):
    """A teacher whose distribution over tokens is learnt beside the labels."""

    teacher: str = Field(min_length=1, description="a model directory or hub id")
    divergence: Literal["forward", "reverse"] = Field(
        "forward", description="KL(teacher || student), or KL(student || teacher)"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of both; the divergence is multiplied by its square"
    )
    weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="of the divergence; the loss on the labels has the rest"
    )
    cache: Literal["memory", "disk"] = Field(
        "memory",
        description="memory: every worker holds the teacher and runs it; disk: it is run once, "
        "before workers start, and they read its logits from a file",
    )
    cache_limit_gib: Annotated[float, Field(gt=0)] = Field(
        64.0, description="a larger file is refused before the teacher is run"
    )


class TrainConfig(Section):
    """How weights move."""

    objective: Annotated[str, NameIn(OBJECTIVES)] = Field(
        "sft", description="what is optimised; see docs/objectives.md"
    )
    batch_size: Positive = Field(16, description="examples per optimizer step, over the whole job")
    lr: Annotated[float, Field(gt=0)] = Field(2.0e-4, description="peak learning rate")
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_fraction: Fraction = Field(0.0, description="of the steps, rising linearly from 0")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="decoupled (AdamW); on matrices, not on norms and biases"
    )
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1.0e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="clip by global norm; null does not clip"
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="budget in passes; with max_examples too, whichever ends first"
    )
    max_examples: Positive | None = Field(
        None, description="budget in examples; neither written means one epoch"
    )
    eval_every_examples: Positive = Field(
        1000, description="evaluate at the first step at or past each multiple, and at the end"
    )
    early_stopping: EarlyStopping | None = None
    precision: Literal["float32", "bfloat16", "float64"] = Field(
        "bfloat16", description="compute precision; float64 is for verification"
    )
    micro_tokens: Literal["auto"] | Positive = Field(
        "auto", description="tokens of one forward pass on one worker, padding included"
    )
    label_smoothing: Fraction = Field(
        0.0, description="of the loss on tokens and single labels; not in evaluations"
    )
    neftune_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="noise on embeddings (NEFTune, arXiv 2310.05914); not in evaluations"
    )
    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(ge=0)]] = Field(
        "none",
        description="classification: by label; balanced counts every label alike, however rare",
    )
    rationale_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="rationale: of the loss on rationales against that on answers"
    )
    kd: KdConfig | None = Field(None, description="objective: kd")
