"""The parameters of a model, block by block, counted without reading a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from raytune_ft.config.methods import METHODS, MethodConfig
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.model.blocks import find_blocks
from raytune_ft.model.critic import add_critic
from raytune_ft.model.heads import Head
from raytune_ft.model.load import Precision, base_dtype, load_model_config
from raytune_ft.model.meta import build_shapes

# Bytes an element: 4 bits, and scales of blocks of 64 under double quantisation (2305.14314).
FOUR_BITS = 0.5 + 0.127 / 8
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Weight:
    """One parameter. `active` is the share of tokens that it sees: below 1 for experts only."""

    shape: tuple[int, ...]
    trained: bool
    active: float = 1.0
    four_bits: bool = False

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def share(self, workers: int) -> int:
        """Elements of the largest shard when rows are split over `workers`."""
        if not self.shape or workers == 1:
            return self.size
        return -(-self.shape[0] // workers) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Shell:
    """A model's parameters. `root` holds those outside the blocks: embeddings, last norm, head.

    Trained weights and all arithmetic on them take `master` bytes an element, frozen weights
    `frozen`, and matrix products `compute`. `traces` keeps what `activations` has found out.
    """

    module: nn.Module = field(repr=False, compare=False)
    root: tuple[Weight, ...]
    blocks: tuple[tuple[Weight, ...], ...]
    hidden: int
    vocabulary: int
    heads_width: int
    precision: Precision
    frozen_dtype: torch.dtype
    traces: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def master(self) -> int:
        """Bytes of an element that is trained, and of its gradient and each moment."""
        return 8 if self.precision == "float64" else 4

    @property
    def frozen(self) -> int:
        """Bytes of an element of a frozen weight."""
        return self.frozen_dtype.itemsize

    @property
    def compute(self) -> int:
        """Bytes of an element in a matrix product."""
        return BYTES[self.precision]

    @property
    def weights(self) -> tuple[Weight, ...]:
        """All parameters."""
        return (*self.root, *(weight for block in self.blocks for weight in block))

    @property
    def total(self) -> int:
        """Elements of all weights."""
        return elements(self.weights)

    @property
    def trained(self) -> int:
        """Elements of the trained weights."""
        return elements(self.weights, trained=True)

    def held(self, weight: Weight) -> float:
        """Bytes of an element between steps."""
        if weight.four_bits:
            return FOUR_BITS
        return self.master if weight.trained else self.frozen


def _heads_width(text: Any, hidden: int) -> int:
    """The widest attention of all layers, which may differ in it."""
    widths = []
    for layer in text.per_layer_config if text.is_heterogeneous else [text]:
        heads = getattr(layer, "num_attention_heads", None) or 1
        widths.append(heads * (getattr(layer, "head_dim", None) or hidden // heads))
    return max(widths)


def elements(weights: Iterable[Weight], trained: bool | None = None) -> int:
    """The number of elements of `weights`; of the trained or frozen ones alone where given."""
    return sum(w.size for w in weights if trained is None or w.trained == trained)


class Shells:
    """What runs with one `head` train; those that train the same share a `Shell`."""

    def __init__(self, head: Head | None) -> None:
        self._head = head
        self._known: list[tuple[object, Shell]] = []

    def of(self, config: Config) -> Shell:
        """Raises as `build_shell`."""
        critic = OBJECTIVES[config.train.objective].critic
        trained = config.model, config.method, config.train.precision
        for known, shell in self._known:
            if known == (*trained, critic):
                return shell
        shell = build_shell(*trained, self._head, critic)
        self._known.append(((*trained, critic), shell))
        return shell


def build_shell(
    model: ModelConfig,
    method: MethodConfig,
    precision: Precision,
    head: Head | None = None,
    critic: bool = False,
) -> Shell:
    """From shapes alone: no weight is read. `critic`: with the value head of PPO.

    Raises:
        ModelError: the model cannot be read, or cannot take the method.
    """
    config = load_model_config(model, head)
    attention = "eager" if model.attention == "eager" else "sdpa"
    built = build_shapes(model, method, head, attn_implementation=attention)
    if critic:
        with torch.device("meta"):
            add_critic(built, precision, detached=False)
    built.eval()
    blocks, quantised = find_blocks(built), METHODS[method.name].quantised
    text = config.get_text_config()
    routed = _routed_share(text)

    def weights(module: nn.Module, inside: bool) -> tuple[Weight, ...]:
        found = []
        for name, parameter in module.named_parameters():
            in_block = any(name.startswith(f"{block}.") for block in blocks)
            if inside or not in_block:
                active = routed if ".experts." in f".{name}." else 1.0
                shape, trained = tuple(parameter.shape), parameter.requires_grad
                rounded = inside and quantised and not trained and len(shape) == 2
                found.append(Weight(shape, trained, active, rounded))
        return tuple(found)

    embedding = built.get_input_embeddings()  # type: ignore[operator]
    return Shell(
        module=built,
        root=weights(built, inside=False),
        blocks=tuple(weights(block, inside=True) for block in blocks.values()),
        hidden=embedding.embedding_dim,
        vocabulary=embedding.num_embeddings,
        heads_width=_heads_width(text, embedding.embedding_dim),
        precision=precision,
        frozen_dtype=base_dtype(model, precision),
    )


def _routed_share(text_config: object) -> float:
    """The share of experts that a token is routed to."""
    chosen = getattr(text_config, "num_experts_per_tok", None)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        experts = getattr(text_config, name, None)
        if isinstance(chosen, int) and isinstance(experts, int) and experts > 0:
            return min(1.0, chosen / experts)
    return 1.0
