"""The critic of PPO: a value head on the states that the head of the model reads.

Shapes: B rows, S tokens, N places, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raytune_ft.errors import ModelError
from raytune_ft.model.load import Precision, master_dtype

VALUE_HEAD = "value_head"
_ATTRIBUTE = "raytune_ft_critic"


class Critic:
    """`value_head`, a linear layer inside the model, and the hooks that call it.

    The layer runs within a forward pass of the model, where a strategy has gathered its weights.
    Its output is among those of the model, so that a backward that begins there gathers them too.
    """

    def __init__(self, model: nn.Module, head: nn.Module, layer: nn.Linear, detached: bool) -> None:
        """`head`: the output embeddings, whose input is read. `detached`: no gradient goes on into
        the model.
        """
        self._layer, self._detached = layer, detached
        self._places_N: Tensor | None = None
        self._values_N1: Tensor | None = None
        model.add_module(VALUE_HEAD, layer)
        head.register_forward_pre_hook(self._read)
        model.register_forward_hook(self._hand_out)
        setattr(model, _ATTRIBUTE, self)

    @contextmanager
    def reading(self, places_N: Tensor) -> Iterator[None]:
        """A context in which a pass of the model also computes values, at these places of all rows
        end to end.
        """
        self._places_N, self._values_N1 = places_N, None
        try:
            yield
        finally:
            self._places_N = None

    @property
    def values_N(self) -> Tensor:
        """Of the last pass that was read, float32 or wider.

        Raises:
            ModelError: the model has not called its head.
        """
        values_N1 = self._values_N1
        if values_N1 is None:
            raise ModelError("train.objective=ppo", *_NO_HEAD)
        return (values_N1 if values_N1.dtype == torch.float64 else values_N1.float())[:, 0]

    def _read(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if self._places_N is None:
            return
        hidden_NH = arguments[0].flatten(0, 1).index_select(0, self._places_N)
        if self._detached:
            hidden_NH = hidden_NH.detach()
        with torch.autocast(hidden_NH.device.type, enabled=False):
            self._values_N1 = self._layer(hidden_NH.to(self._layer.weight.dtype))

    def _hand_out(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """In a field that every output of transformers has, since only these can be copied."""
        if self._places_N is not None and self._values_N1 is not None:
            output["hidden_states"] = (self._values_N1,)


_NO_HEAD = (
    "needs a model with an output layer whose input the critic reads",
    "write train.objective: grpo",
)


def add_critic(model: nn.Module, precision: Precision, detached: bool) -> None:
    """Give a built model a critic, before a strategy lays it out. All its values are 0 at first.

    Raises:
        ModelError: the model has no output embeddings.
    """
    check_critic(model)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    width = head.in_features if hasattr(head, "in_features") else head.weight.shape[-1]
    layer = nn.Linear(width, 1, dtype=master_dtype(precision))
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    Critic(model, head, layer, detached)


def check_critic(model: nn.Module) -> None:
    """Raises ModelError where a model, which may be without weights, cannot have a critic."""
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ModelError("train.objective=ppo", *_NO_HEAD)


def critic_of(model: nn.Module) -> Critic | None:
    """The critic of a model, None where it has none."""
    return getattr(model, _ATTRIBUTE, None)


def critic_weights(model: nn.Module) -> list[str]:
    """The names of the critic's weights in the model."""
    return [name for name, _ in model.named_parameters() if name.startswith(f"{VALUE_HEAD}.")]
