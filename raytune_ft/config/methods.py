"""The `method` section: which weights move. One class per method."""

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


class FullMethod(Section):
    """Every weight moves."""

    name: Literal["full"]


class FreezeMethod(Section):
    """Chosen weights of the model itself move; what is trained and saved is a plain model."""

    name: Literal["freeze"]
    first: Annotated[int, Field(ge=0)] | None = Field(
        None, description="freeze the first so many blocks; blocks above them train"
    )
    last: Annotated[int, Field(ge=0)] | None = Field(
        None, description="train the last so many blocks alone; 0 freezes all blocks"
    )
    embeddings: bool = Field(
        False, description="train the embeddings, and a head that shares their weight"
    )
    head: bool = Field(
        True, description="train what lies above the blocks: the last norm and a head of its own"
    )
    norms: bool | None = Field(
        None, description="train every norm, or none; null leaves each to its block"
    )
    train: list[str] = Field(
        default=[],
        description="weights that train whatever the keys above say: parts of their names such "
        "as q_proj or layers.0.mlp, or whole names with * and ?",
    )
    freeze: list[str] = Field(
        default=[], description="weights that do not, likewise; decides over all other keys"
    )
    unfreeze_every_examples: Positive | None = Field(
        None,
        description="gradual unfreezing (arXiv 1801.06146): begin with the topmost block, and add "
        "the next one below after each so many examples, embeddings last",
    )


class _LowRank(Section):
    """What LoRA's kinds have in common."""

    name: str
    rank: Positive = Field(16, description="columns of A, rows of B")
    alpha: Annotated[float, Field(gt=0)] = Field(
        32.0, description="the delta is scaled by alpha / rank (alpha / sqrt(rank) with rslora)"
    )
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="all-linear, or endings of module names such as q_proj"
    )
    dropout: Fraction = Field(0.0, description="on the adapter's input")
    rslora: bool = Field(False, description="rank-stabilised scaling (arXiv 2312.03732)")
    dora: bool = Field(False, description="weight-decomposed LoRA (arXiv 2402.09353)")
    rank_pattern: dict[str, Positive] = Field(
        default={},
        description="ranks of single modules, by endings of their names (regular expressions)",
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="alphas of single modules, likewise"
    )
    lr_ratio: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="LoRA+ (arXiv 2402.12354): B's learning rate is so many times train.lr, "
        "which is A's",
    )


class LoraMethod(_LowRank):
    """Low-rank adapters on a frozen base (arXiv 2106.09685), through PEFT."""

    name: Literal["lora"] = "lora"
    init: Literal["default", "gaussian", "pissa", "olora"] = Field(
        "default",
        description="how A and B begin: as in PEFT, with A from a normal distribution, or as the "
        "principal part (arXiv 2404.02948) or first columns (arXiv 2406.01775) of each weight",
    )


class QloraMethod(_LowRank):
    """LoRA on a base held in 4 bits (arXiv 2305.14314), by bitsandbytes.

    Its linear layers are rounded but the head; promotion folds into the base as it lies on disk.
    """

    name: Literal["qlora"]
    quantisation: Literal["nf4", "fp4"] = Field("nf4", description="the 16 values of a weight")
    double_quantisation: bool = Field(True, description="the scales of blocks are rounded too")


class Ia3Method(Section):
    """Learned factors of keys, values and what enters the last layer of an MLP (arXiv
    2205.05638).
    """

    name: Literal["ia3"]
    targets: Literal["auto", "all-linear"] | list[str] = Field(
        "auto", description="auto: what PEFT names for this kind of model; else as with lora"
    )
    feedforward: Literal["auto"] | list[str] = Field(
        "auto", description="which of them are scaled at their input; the others at their output"
    )


class VeraMethod(Section):
    """Two learned vectors around two random matrices that all layers share (arXiv 2310.11454)."""

    name: Literal["vera"]
    rank: Positive = Field(256, description="of the shared matrices, above those of lora")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="all-linear, or endings of module names such as q_proj"
    )
    dropout: Fraction = Field(0.0, description="on the adapter's input")
    d_initial: float = Field(0.1, description="where the vector between the matrices begins")
    projection_seed: Annotated[int, Field(ge=0)] = Field(
        0, description="draws the shared matrices; they are saved with the adapter"
    )


class OftMethod(Section):
    """Learned rotations of each layer's input, in blocks (arXiv 2306.07280)."""

    name: Literal["oft"]
    block_size: Positive = Field(
        32, description="of the rotations; the next divisor of a layer's input is taken"
    )
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="all-linear, or endings of module names such as q_proj"
    )
    cayley_neumann: bool = Field(
        True,
        description="rotations by a short series, not by an inverse: faster, nearly orthogonal",
    )
    coft: bool = Field(False, description="keep rotations near the identity")
    eps: Annotated[float, Field(gt=0)] = Field(6e-5, description="how near, with coft")
    block_share: bool = Field(False, description="one rotation for all blocks of a layer")


WHOLE_MODEL = ("full", "freeze")
"""Methods that train the model's own weights, so that what they leave is a model, no adapter."""

MethodConfig = Annotated[
    FullMethod
    | FreezeMethod
    | LoraMethod
    | QloraMethod
    | Ia3Method
    | VeraMethod
    | OftMethod
    | ActivationMethod,
    Field(discriminator="name"),
]
