"""Activation checkpointing: activations of blocks are recomputed in the backward, not kept."""

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

POLICIES: tuple[Activations, ...] = ("none", "selective", "full")
"""From the fastest to the one that needs least memory."""
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm"})
_Kept = dict[Any, deque[Any]]


def choose_checkpointing(configured: str) -> Activations:
    """The written policy; none for an `auto` that was not resolved from an estimate of memory."""
    return next((policy for policy in POLICIES if policy == configured), POLICIES[0])


def checkpoint_activations(model: nn.Module, activations: Activations) -> None:
    """Wrap the forward of every repeated block; names of parameters stay.

    The block itself is not wrapped: hooks of a strategy that gather its weights must stay outside
    the recomputed part. transformers' own switch has no effect in eval mode, which is used here.
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
    """Contexts for a block's forward and for its recomputation.

    torch's `create_selective_checkpoint_contexts` requires the same operators both times, which
    does not hold where weights are gathered inside the block (ZeRO 3).
    """
    kept: _Kept = defaultdict(deque)
    return _Keep(kept), _Reuse(kept)


def _is_expensive(operator: Any) -> bool:
    """Whether it is a matrix product or attention."""
    name = operator.name().removeprefix("aten::").partition(".")[0]
    return name in _PRODUCTS or "scaled_dot_product" in name or name == "torch_attn::_varlen_attn"


class _Keep(TorchDispatchMode):
    """Keeps the results of products, with a copy of those that the model then changes in place."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept
        self._by_storage: dict[int, _Versioned] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs or {}):
                if (changed := self._by_storage.pop(_storage(tensor), None)) is not None:
                    changed.copy()
        result = func(*args, **(kwargs or {}))
        if _is_expensive(func):
            self._kept[func].append(tree_map(self._with_version, result))
        elif func is torch.ops.aten._unsafe_view.default and (
            viewed := self._by_storage.get(_storage(args[0]))
        ):
            viewed.follow(result)
        return result

    def _with_version(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        kept = self._by_storage[_storage(value)] = _Versioned(value)
        return kept


class _Reuse(TorchDispatchMode):
    """Returns the kept results instead of computing products again."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_expensive(func):
            return tree_map(_unchanged, self._kept[func].popleft())
        return func(*args, **(kwargs or {}))


class _Versioned:
    """A tensor with its version counter; `tree_map` treats it as a leaf."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = _same_version(tensor)
        self._seen = [(self.tensor, tensor._version)]

    def follow(self, view: Tensor) -> None:
        """Add a view with its own version counter, such as that of a three-dimensional product."""
        self._seen.append((_same_version(view), view._version))

    def copy(self) -> None:
        """Copy the values, since the memory is about to be overwritten."""
        self.tensor = self.tensor.clone()
        self._seen = []

    @property
    def is_unchanged(self) -> bool:
        """Whether no write went unnoticed."""
        return all(tensor._version == version for tensor, version in self._seen)


def _same_version(tensor: Tensor) -> Tensor:
    # Inside a dispatch mode, a detached tensor would get its own version counter.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator changes in place."""
    named = [(argument, kwargs.get(argument.name)) for argument in func._schema.arguments]
    placed = list(zip(func._schema.arguments, args, strict=False)) + named
    return [
        value
        for argument, value in placed
        if argument.alias_info is not None
        and argument.alias_info.is_write
        and isinstance(value, Tensor)
    ]


def _unchanged(value: Any) -> Any:
    if not isinstance(value, _Versioned):
        return value
    if not value.is_unchanged:
        raise RuntimeError(
            "parallel.activation_checkpointing=selective keeps a result that this model changes in "
            "place outside of its block; write full"
        )
    return value.tensor
