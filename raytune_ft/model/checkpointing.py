"""Activation checkpointing: blocks are computed again in the backward instead of being kept."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint, noop_context_fn

from raytune_ft.model.blocks import find_blocks

Activations = Literal["none", "selective", "full"]

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm"})
_Kept = dict[Any, deque[Any]]


def checkpoint_activations(model: nn.Module, activations: Activations) -> None:
    """Wrap the forward of every repeated block; names of parameters stay.

    Not the block: a strategy's hooks on it gather its weights, and stay outside of what is
    computed twice. transformers' own switch does nothing in eval mode, in which models are here.
    """
    if activations == "none":
        return
    for block in find_blocks(model).values():
        block.forward = _twice(block.forward, selective=activations == "selective")


def _twice(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    contexts = _keep_and_reuse if selective else noop_context_fn

    def computed_twice(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **named)

    return computed_twice


def _keep_and_reuse() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Around a block's forward, and around its second one.

    torch's own `create_selective_checkpoint_contexts` wants every operator to come again as
    often, which does not hold where weights are gathered inside of the block (ZeRO 3).
    """
    kept: _Kept = defaultdict(deque)
    return _Keep(kept), _Reuse(kept)


def _is_dear(operator: Any) -> bool:
    """Is it a matrix product or attention?"""
    name = operator.name().removeprefix("aten::").partition(".")[0]
    return name in _PRODUCTS or "scaled_dot_product" in name


class _Keep(TorchDispatchMode):
    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_dear(func):
            self._kept[func].append(tree_map(_with_version, result))
        return result


class _Reuse(TorchDispatchMode):
    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_dear(func):
            return tree_map(_unchanged, self._kept[func].popleft())
        return func(*args, **(kwargs or {}))


class _Versioned:
    """A tensor as it was; for `tree_map` a leaf."""

    def __init__(self, tensor: Tensor) -> None:
        # Below autograd, where modes are, a detached tensor would count its changes for itself.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensor = tensor.detach()
        self.version = tensor._version


def _with_version(value: Any) -> Any:
    return _Versioned(value) if isinstance(value, Tensor) else value


def _unchanged(value: Any) -> Any:
    if not isinstance(value, _Versioned):
        return value
    if value.tensor._version != value.version:
        raise RuntimeError(
            "parallel.activation_checkpointing=selective keeps results that this model changes in "
            "place; write full"
        )
    return value.tensor
