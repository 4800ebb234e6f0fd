"""The methods: keys of the `method` section, and what the rest of the package asks about each.

A method is added by one file and one entry in `METHODS`. The entry has the class of its keys and
its facts, and imports what needs torch when `implementation` is called. This module loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import Field

from raytune_ft.config.section import Fraction, Positive, Section
from raytune_ft.errors import ConfigError

Count = Annotated[int, Field(ge=0)]
Layers = Literal["all"] | list[Count]
LAYERS = "all, or numbers of blocks from 0"
Targets = Literal["all-linear"] | list[str]
TARGETS = "all-linear, or endings of module names such as q_proj"


class MethodConfig(Section):
    """Keys of one method, and the facts that depend on them."""

    name: str

    def check(self) -> None:
        """Raises ConfigError for keys that contradict each other or have no effect."""

    @property
    def virtual_tokens(self) -> int:
        """Positions that the method takes before the first token of every example."""
        return 0

    @property
    def late_groups(self) -> str | None:
        """The key that lets parameter groups start after the first step, None where all start."""
        return None

    def unpackable(self) -> str | None:
        """Which key keeps trials of a packable method from being packed; None where none does."""
        return None


class FullMethod(MethodConfig):
    """All weights of the model are trained."""

    name: Literal["full"]


class FreezeMethod(MethodConfig):
    """Chosen weights of the model itself are trained; the result is a plain model."""

    name: Literal["freeze"]
    first: Count | None = Field(
        None, description="number of lower blocks that are frozen; the blocks above them train"
    )
    last: Count | None = Field(
        None, description="number of upper blocks that train; 0 freezes all blocks"
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
        default=[],
        description="weights that stay frozen whatever all other keys say: names as under train",
    )
    unfreeze_every_examples: Positive | None = Field(
        None,
        description="gradual unfreezing (arXiv 1801.06146): training begins with the topmost "
        "block; each time this many examples were seen, the next block below joins, and "
        "embeddings join last",
    )

    def check(self) -> None:
        if self.first is not None and self.last is not None:
            raise ConfigError(
                f"method.first={self.first}",
                f"counts frozen blocks from below, and method.last={self.last} trained blocks from "
                "above",
                "write one of the two",
            )

    @property
    def late_groups(self) -> str | None:
        every = self.unfreeze_every_examples
        return None if every is None else f"method.unfreeze_every_examples={every}"


class _LowRank(MethodConfig):
    """Keys that lora and qlora share."""

    rank: Positive = Field(16, description="columns of A, rows of B")
    alpha: Annotated[float, Field(gt=0)] = Field(
        32.0, description="the delta is scaled by alpha / rank (alpha / sqrt(rank) with rslora)"
    )
    targets: Targets = Field("all-linear", description=TARGETS)
    dropout: Fraction = Field(0.0, description="on the adapter's input")
    rslora: bool = Field(False, description="rank-stabilised scaling (arXiv 2312.03732)")
    dora: bool = Field(False, description="weight-decomposed LoRA (arXiv 2402.09353)")
    rank_pattern: dict[str, Positive] = Field(
        default={},
        description="ranks of single modules, by endings of their names (regular expressions)",
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="alphas of single modules, by endings of their names (regular expressions)",
    )
    lr_ratio: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="LoRA+ (arXiv 2402.12354): the learning rate of B as a multiple of train.lr, "
        "which is that of A",
    )

    def check(self) -> None:
        _check_targets(self.targets)


class LoraMethod(_LowRank):
    """Low-rank adapters on a frozen base (arXiv 2106.09685), through PEFT."""

    name: Literal["lora"] = "lora"
    init: Literal["default", "gaussian", "pissa", "olora"] = Field(
        "default",
        description="initial A and B: those of PEFT, with A from a normal distribution, or the "
        "principal part (arXiv 2404.02948) or first columns (arXiv 2406.01775) of each weight",
    )

    @property
    def begins_with_weights(self) -> bool:
        """Whether A and B begin with a part of the base's weights."""
        return self.init in ("pissa", "olora")

    @property
    def exported_rank(self) -> int:
        """Of the adapter in a checkpoint, without `rank_pattern`; see `model.methods.pissa`."""
        return 2 * self.rank if self.begins_with_weights else self.rank

    def check(self) -> None:
        super().check()
        if self.dora and self.begins_with_weights:
            raise ConfigError(
                f"method.init={self.init}",
                "changes the weights whose norm method.dora=true uses",
                "write method.init: default, or method.dora: false",
            )

    def unpackable(self) -> str | None:
        if self.dora:
            return "method.dora=true normalises by the weights of each run's own sum"
        if self.begins_with_weights:
            return f"method.init={self.init} modifies the shared base differently in each trial"
        for key in ("rank_pattern", "alpha_pattern"):
            if getattr(self, key):
                return (
                    f"method.{key} gives the layers of one run several scales, and a slot has one"
                )
        if self.lr_ratio != 1.0:
            return f"method.lr_ratio={self.lr_ratio:g} gives one run two learning rates"
        if self.dropout > 0:
            return f"method.dropout={self.dropout} draws noise that depends on the layout"
        return None


class QloraMethod(_LowRank):
    """LoRA on a base held in 4 bits (arXiv 2305.14314), by bitsandbytes.

    All linear layers of the base except the head are rounded; promotion folds into the base as it
    lies on disk.
    """

    name: Literal["qlora"]
    quantisation: Literal["nf4", "fp4"] = Field("nf4", description="the 16 values of a weight")
    double_quantisation: bool = Field(True, description="the scales of blocks are rounded too")


class Ia3Method(MethodConfig):
    """Learned factors of keys, values and the input of an MLP's last layer (arXiv 2205.05638)."""

    name: Literal["ia3"]
    targets: Literal["auto", "all-linear"] | list[str] = Field(
        "auto", description="auto: what PEFT names for this kind of model; else as with lora"
    )
    feedforward: Literal["auto"] | list[str] = Field(
        "auto", description="those of them scaled at their input; the others at their output"
    )

    def check(self) -> None:
        _check_targets(self.targets)


class VeraMethod(MethodConfig):
    """Two learned vectors around two random matrices that all layers share (arXiv 2310.11454)."""

    name: Literal["vera"]
    rank: Positive = Field(256, description="of the shared matrices, larger than those of lora")
    targets: Targets = Field("all-linear", description=TARGETS)
    dropout: Fraction = Field(0.0, description="on the adapter's input")
    d_initial: float = Field(0.1, description="initial value of the vector between the matrices")
    projection_seed: Count = Field(
        0, description="draws the shared matrices; they are saved with the adapter"
    )

    def check(self) -> None:
        _check_targets(self.targets)


class OftMethod(MethodConfig):
    """Learned rotations of each layer's input, in blocks (arXiv 2306.07280)."""

    name: Literal["oft"]
    block_size: Positive = Field(
        32, description="of the rotations; the next divisor of a layer's input is taken"
    )
    targets: Targets = Field("all-linear", description=TARGETS)
    cayley_neumann: bool = Field(
        True,
        description="rotations by a short series, not by an inverse: faster, nearly orthogonal",
    )
    coft: bool = Field(False, description="keep rotations near the identity")
    eps: Annotated[float, Field(gt=0)] = Field(6e-5, description="largest distance under coft")
    block_share: bool = Field(False, description="one rotation for all blocks of a layer")

    def check(self) -> None:
        _check_targets(self.targets)


class Positions(Section):
    """Where LoReFT intervenes in the prompt of every example."""

    first: Count = Field(7, description="tokens of the prompt, from its beginning")
    last: Count = Field(7, description="tokens of the prompt, up to its end")


class LoreftMethod(MethodConfig):
    """Low-rank interventions on the residual stream of a frozen base (arXiv 2404.03592)."""

    name: Literal["loreft"]
    rank: Positive = Field(4, description="dimensions of the subspace that is edited")
    layers: Layers = Field("all", description=LAYERS)
    positions: Positions = Positions()
    tied: bool = Field(False, description="one intervention for first and last tokens of a block")
    dropout: Fraction = Field(0.0, description="on what is added to the residual stream")

    def check(self) -> None:
        _check_layers(self.layers)
        if not self.positions.first + self.positions.last:
            raise ConfigError(
                "method.positions={first: 0, last: 0}",
                "names no token",
                "write for example {first: 7, last: 7}",
            )


class AdapterMethod(MethodConfig):
    """Bottleneck layers in a frozen base (arXiv 1902.00751; after the MLP alone: 2005.00247)."""

    name: Literal["adapter"]
    bottleneck: Positive = Field(64, description="dimensions between the two projections")
    after: Literal["both", "attention", "mlp"] = Field(
        "both", description="the sublayers whose output is adapted"
    )
    activation: Literal["relu", "gelu", "silu"] = Field(
        "relu", description="between the projections"
    )
    layers: Layers = Field("all", description=LAYERS)
    dropout: Fraction = Field(0.0, description="on the bottleneck")

    def check(self) -> None:
        _check_layers(self.layers)


class _VirtualTokens(MethodConfig):
    """Keys of methods that train virtual tokens."""

    tokens: Positive = Field(20, description="virtual tokens")

    @property
    def virtual_tokens(self) -> int:
        return self.tokens


class PromptMethod(_VirtualTokens):
    """Embeddings of virtual tokens before every example (arXiv 2104.08691), in PEFT's format."""

    name: Literal["prompt"]
    init_text: str | None = Field(
        None, description="text whose embeddings they begin with; null: words at random"
    )

    def check(self) -> None:
        if self.init_text == "":
            raise ConfigError(
                "method.init_text=''", "has no token to begin with", "write a text, or null"
            )


class PTuningMethod(_VirtualTokens):
    """Virtual tokens that a small MLP computes (arXiv 2103.10385), in PEFT's format."""

    name: Literal["p_tuning"]
    hidden: Positive | None = Field(
        None, description="width of the MLP's hidden layers; null: that of the model"
    )


class PrefixMethod(_VirtualTokens):
    """Keys and values of virtual tokens in every layer (arXiv 2101.00190), in PEFT's format."""

    name: Literal["prefix"]
    projection: bool = Field(False, description="a small MLP computes them")
    hidden: Positive | None = Field(None, description="width of that MLP; null: that of the model")

    def check(self) -> None:
        if self.hidden is not None and not self.projection:
            raise ConfigError(
                f"method.hidden={self.hidden}",
                "is the width of a projection, and method.projection is false",
                "write method.projection: true, or leave the key out",
            )


def _check_layers(layers: str | list[int]) -> None:
    if isinstance(layers, str):
        return
    if not layers:
        raise ConfigError("method.layers=[]", "names no block", "write all, or some numbers")
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        raise ConfigError(f"method.layers={layers}", f"names {twice} twice", "write it once")


def _check_targets(targets: str | list[str]) -> None:
    if targets == []:
        raise ConfigError("method.targets=[]", "adapts nothing", "write all-linear or some names")


@dataclass(frozen=True)
class Method:
    """Facts of one method.

    config: the class of its keys; its `name` is a Literal.
    implementation: imports and returns a `model.methods.base.Implementation`.
    trains: "model" is every weight, "part" chosen weights of the model itself, "adapter" weights
        beside a frozen base that can be folded into it, "activations" modules that work on
        activations of a frozen base and cannot be folded.
    quantised: its base is held in 4 bits, as keys `quantisation` and `double_quantisation` say.
    packable: `config` is a LoraMethod, and packed/lora.py can pack its trials unless
        `MethodConfig.unpackable` names a key.
    vllm: vLLM can sample with what it trains, sent as checkpoints export it.
    one_example_rows: why a row cannot hold several examples, None where it can.
    lr_factor: its published learning rate as a multiple of that of `full`; None: not published.
    saved_as: what adapter_config.json calls it, by `peft_type` or `method`; None leaves a model.
    own_weights: how PEFT begins the names of an adapter's own weights, such as `lora_`.
    """

    config: type[MethodConfig]
    implementation: Callable[[], Any]
    trains: Literal["model", "part", "adapter", "activations"]
    quantised: bool = False
    packable: bool = False
    vllm: bool = False
    one_example_rows: str | None = None
    lr_factor: float | None = None
    saved_as: str | None = None
    own_weights: str | None = None

    @property
    def whole_model(self) -> bool:
        """It trains the model's own weights and leaves a model, not an adapter."""
        return self.trains in ("model", "part")

    @property
    def on_activations(self) -> bool:
        """It leaves an adapter that cannot be folded and cannot hold a task head."""
        return self.trains == "activations"


def _freeze() -> ModuleType:
    from raytune_ft.model.methods import freeze

    return freeze


def _lora() -> ModuleType:
    from raytune_ft.model.methods import lora

    return lora


def _peft() -> ModuleType:
    from raytune_ft.model.methods import peft

    return peft


def _loreft() -> ModuleType:
    from raytune_ft.model.methods import loreft

    return loreft


def _bottleneck() -> ModuleType:
    from raytune_ft.model.methods import bottleneck

    return bottleneck


def _virtual() -> ModuleType:
    from raytune_ft.model.methods import virtual

    return virtual


def _prefix() -> ModuleType:
    from raytune_ft.model.methods import prefix

    return prefix


DEFAULT_METHOD = "lora"
METHODS: dict[str, Method] = {
    "full": Method(FullMethod, lambda: _freeze().FULL, "model", vllm=True, lr_factor=1.0),
    "freeze": Method(FreezeMethod, lambda: _freeze().FREEZE, "part", lr_factor=1.0),
    "lora": Method(
        LoraMethod,
        lambda: _lora().LORA,
        "adapter",
        packable=True,
        vllm=True,
        lr_factor=10.0,
        saved_as="LORA",
        own_weights="lora_",
    ),
    "qlora": Method(
        QloraMethod,
        lambda: _lora().LORA,
        "adapter",
        quantised=True,
        lr_factor=10.0,
        saved_as="LORA",
        own_weights="lora_",
    ),
    "ia3": Method(Ia3Method, lambda: _peft().IA3, "adapter", saved_as="IA3", own_weights="ia3_"),
    "vera": Method(
        VeraMethod, lambda: _peft().VERA, "adapter", saved_as="VERA", own_weights="vera_lambda_"
    ),
    "oft": Method(OftMethod, lambda: _peft().OFT, "adapter", saved_as="OFT", own_weights="oft_"),
    "loreft": Method(LoreftMethod, lambda: _loreft().LOREFT, "activations", saved_as="loreft"),
    "adapter": Method(
        AdapterMethod, lambda: _bottleneck().ADAPTER, "activations", saved_as="adapter"
    ),
    "prompt": Method(
        PromptMethod, lambda: _virtual().PROMPT, "activations", saved_as="PROMPT_TUNING"
    ),
    "p_tuning": Method(
        PTuningMethod, lambda: _virtual().P_TUNING, "activations", saved_as="P_TUNING"
    ),
    "prefix": Method(
        PrefixMethod,
        lambda: _prefix().PREFIX,
        "activations",
        one_example_rows="a prefix stands before a row, not before each of its examples",
        saved_as="PREFIX_TUNING",
    ),
}
