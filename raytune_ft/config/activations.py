"""Methods that work on activations: no weight of the base changes, and nothing can be folded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from raytune_ft.config.section import Fraction, Positive, Section
from raytune_ft.errors import ConfigError

Layer = Annotated[int, Field(ge=0)]
Layers = Literal["all"] | list[Layer]
Count = Annotated[int, Field(ge=0)]


class Positions(Section):
    """Where LoReFT intervenes in the prompt of every example."""

    first: Count = Field(7, description="tokens of the prompt, from its beginning")
    last: Count = Field(7, description="tokens of the prompt, up to its end")


class LoreftMethod(Section):
    """Low-rank interventions on the residual stream of a frozen base (arXiv 2404.03592)."""

    name: Literal["loreft"]
    rank: Positive = Field(4, description="dimensions of the subspace that is edited")
    layers: Layers = Field("all", description="all, or numbers of blocks from 0")
    positions: Positions = Positions()
    tied: bool = Field(False, description="one intervention for first and last tokens of a block")
    dropout: Fraction = Field(0.0, description="on what is added to the residual stream")


class AdapterMethod(Section):
    """Bottleneck layers in a frozen base (arXiv 1902.00751; after the MLP alone: 2005.00247)."""

    name: Literal["adapter"]
    bottleneck: Positive = Field(64, description="dimensions between the two projections")
    after: Literal["both", "attention", "mlp"] = Field(
        "both", description="of which sublayers the output is adapted"
    )
    activation: Literal["relu", "gelu", "silu"] = Field("relu", description="between them")
    layers: Layers = Field("all", description="all, or numbers of blocks from 0")
    dropout: Fraction = Field(0.0, description="on the bottleneck")


class PromptMethod(Section):
    """Embeddings of virtual tokens before every example (arXiv 2104.08691), in PEFT's format."""

    name: Literal["prompt"]
    tokens: Positive = Field(20, description="virtual tokens")
    init_text: str | None = Field(
        None, description="they begin as the embeddings of this text; null: of words at random"
    )


class PTuningMethod(Section):
    """Virtual tokens that a small MLP computes (arXiv 2103.10385), in PEFT's format."""

    name: Literal["p_tuning"]
    tokens: Positive = Field(20, description="virtual tokens")
    hidden: Positive | None = Field(
        None, description="dimensions of the MLP's hidden layers; null: as many as the model's"
    )


class PrefixMethod(Section):
    """Keys and values of virtual tokens in every layer (arXiv 2101.00190), in PEFT's format."""

    name: Literal["prefix"]
    tokens: Positive = Field(20, description="virtual tokens")
    projection: bool = Field(False, description="a small MLP computes them")
    hidden: Positive | None = Field(
        None, description="dimensions of that MLP; null: as many as the model's"
    )


ActivationMethod = LoreftMethod | AdapterMethod | PromptMethod | PTuningMethod | PrefixMethod
ACTIVATIONS = ("loreft", "adapter", "prompt", "p_tuning", "prefix")


def virtual_positions(method: object) -> int:
    """Positions that a method takes before the first token of every example."""
    if isinstance(method, PromptMethod | PTuningMethod | PrefixMethod):
        return method.tokens
    return 0


def check_activations(method: object) -> None:
    """Raises ConfigError for keys that name nothing, or that nothing would use."""
    if isinstance(method, LoreftMethod | AdapterMethod) and isinstance(method.layers, list):
        _check_layers(method.layers)
    if isinstance(method, LoreftMethod) and not method.positions.first + method.positions.last:
        raise ConfigError(
            "method.positions={first: 0, last: 0}",
            "names no token",
            "write for example {first: 7, last: 7}",
        )
    if isinstance(method, PromptMethod) and method.init_text == "":
        raise ConfigError(
            "method.init_text=''", "has no token to begin with", "write a text, or null"
        )
    if isinstance(method, PrefixMethod) and method.hidden is not None and not method.projection:
        raise ConfigError(
            f"method.hidden={method.hidden}",
            "is of a projection, and there is none",
            "write method.projection: true, or leave the key out",
        )


def check_promotion(merge: str, metrics: Iterable[str], methods: Iterable[str]) -> None:
    """Raises ConfigError for a promotion that such a method cannot have."""
    name = next((name for name in methods if name in ACTIVATIONS), None)
    if name is None:
        return
    if merge != "best":
        raise ConfigError(
            f"promote.merge={merge}",
            f"merges weights, and method.name={name} changes none",
            "write promote.merge: best",
        )
    task = next((metric for metric in metrics if metric.startswith("lm_eval:")), None)
    if task is not None:
        raise ConfigError(
            f"promote.metrics={task}",
            f"calls a plain model, and method.name={name} works on activations",
            "leave it out",
        )


def check_head(methods: Iterable[str]) -> None:
    """Raises ConfigError for a method whose adapter has no place for the head of a classifier."""
    name = next((name for name in methods if name in ACTIVATIONS), None)
    if name is not None:
        raise ConfigError(
            f"method.name={name}",
            "trains no head and keeps none in its adapter, and train.objective=classification is "
            "of a head",
            "write lora, freeze or full",
        )


def _check_layers(layers: list[int]) -> None:
    if not layers:
        raise ConfigError("method.layers=[]", "names no block", "write all, or some numbers")
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        raise ConfigError(f"method.layers={layers}", f"names {twice} twice", "write it once")
