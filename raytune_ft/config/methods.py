"""The `method` section: which weights move. One class per method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_ft.config.activations import ActivationMethod
from raytune_ft.config.section import Fraction, Positive, Section


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
