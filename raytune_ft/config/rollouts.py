"""The sections of `train` for objectives that learn from what the model says; names as in TRL."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_ft.config.section import Positive, Section


class VllmConfig(Section):
    """Where vLLM samples: processes of their own on GPUs that no worker trains on."""

    engines: Positive = Field(1, description="copies of the model, which share the prompts")
    gpus: Positive = Field(
        1, description="of each engine, on one node; they share its weights (tensor parallelism)"
    )


class RolloutConfig(Section):
    """Completions that are sampled during training, scored, and then trained on."""

    num_generations: Positive = Field(
        8,
        description="completions of each prompt, which grpo and online_dpo compare with each other",
    )
    max_completion_length: Positive = Field(256, description="tokens of the longest completion")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="logits are divided by it, in sampling and in the loss"
    )
    steps_per_generation: Positive = Field(
        1, description="steps that one rollout is for, each with prompts of its own"
    )
    num_iterations: Positive = Field(
        1, description="how often the steps of one rollout are taken; each time counts as examples"
    )
    eval_completions: Positive = Field(
        1,
        description="completions of each validation prompt in an evaluation; more make its figures "
        "less noisy",
    )
    keep: Annotated[int, Field(ge=0)] = Field(
        64, description="completions of each rollout that are written to rollouts.jsonl"
    )
    engine: Literal["auto", "embedded", "vllm"] = Field(
        "auto",
        description="what samples: embedded, the model in training itself; vllm, copies of it on "
        "other GPUs; auto is embedded",
    )
    vllm: VllmConfig = VllmConfig()

    @property
    def on_vllm(self) -> bool:
        """Whether vLLM samples."""
        return self.engine == "vllm"

    @property
    def steps(self) -> int:
        """Steps of one rollout."""
        return self.steps_per_generation * self.num_iterations


class GrpoConfig(Section):
    """Group relative policy optimisation and its family."""

    loss_type: Literal["dapo", "grpo", "dr_grpo", "cispo"] = Field(
        "dapo",
        description="what the losses of tokens are divided by: dapo and cispo: the tokens of the "
        "step; grpo: those of their completion; dr_grpo: max_completion_length. cispo clips the "
        "ratio as a weight, without losing a token's gradient",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="the ratio to the sampling policy, of a token or a completion (GSPO)"
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="advantages are divided by the standard deviation of these rewards"
    )
    beta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the KL divergence from the model before training"
    )
    kl: Literal["loss", "reward"] = Field(
        "loss",
        description="where the divergence enters: a term for each token, or off the reward of each "
        "completion",
    )
    epsilon: Annotated[float, Field(gt=0)] = Field(
        0.2, description="ratios below 1 - epsilon are clipped"
    )
    epsilon_high: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="ratios above 1 + epsilon_high are clipped, of cispo above epsilon_high; null "
        "is epsilon",
    )
    delta: Annotated[float, Field(gt=1)] | None = Field(
        None, description="largest ratio, also where the advantage is negative (two-sided clipping)"
    )
    mask_truncated_completions: bool = Field(
        False, description="completions that were cut at max_completion_length are not trained on"
    )
    drop_zero_std: bool = Field(
        False, description="groups whose rewards are all equal count nothing"
    )
    vllm_importance_sampling_clip_max: Annotated[float, Field(ge=1)] | None = Field(
        3.0,
        description="what vLLM sampled is weighed, token by token, by its probability in training "
        "over that under vLLM, at most this (token_truncate of TRL); null does not weigh",
    )
    gate: str | None = Field(
        None,
        description="the name of a reward; a group for which it is the same everywhere counts "
        "nothing, whatever the other rewards say",
    )

    @property
    def high(self) -> float:
        """The upper clip."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


class PpoConfig(Section):
    """Proximal policy optimisation with a critic."""

    kl_coef: Annotated[float, Field(ge=0)] = Field(
        0.05,
        description="of the log ratio to the model before training, which is taken off the "
        "reward of each token",
    )
    cliprange: Annotated[float, Field(gt=0)] = Field(
        0.2, description="ratios to the sampling policy are clipped at 1 - cliprange, 1 + cliprange"
    )
    vf_coef: Annotated[float, Field(gt=0)] = Field(
        0.1, description="weight of the loss of values, half the squared error"
    )
    cliprange_value: Annotated[float, Field(gt=0)] | None = Field(
        0.2,
        description="how far values move from those of the rollout before they are clipped; null "
        "does not clip",
    )
    gamma: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="discount of the reward of each further token"
    )
    lam: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="of generalised advantages: 1 sums rewards to the end, 0 trusts the next value",
    )
    whiten_advantages: bool = Field(
        True, description="advantages of a rollout get the mean 0 and the variance 1"
    )
    detach_values: bool = Field(
        False, description="the loss of values trains the value head alone, not the model under it"
    )
    value_lr_ratio: Annotated[float, Field(gt=0)] = Field(
        1.0, description="the learning rate of the value head, as a multiple of train.lr"
    )
