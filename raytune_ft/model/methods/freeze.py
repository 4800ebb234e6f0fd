"""Training the model's own weights: all of them (`full`) or chosen ones (`freeze`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from raytune_ft.config.methods import FreezeMethod
from raytune_ft.errors import ModelError
from raytune_ft.model.blocks import find_blocks
from raytune_ft.model.methods.base import Implementation, ParamGroup


def apply_full(base: nn.Module, method: Any) -> nn.Module:
    """Train every weight."""
    return base.requires_grad_(True)


def apply_freeze(base: nn.Module, method: FreezeMethod) -> nn.Module:
    """Train the weights that `method` chooses and freeze the others.

    Raises:
        ModelError: a pattern matches no weight, the model has fewer blocks, or no weight is left.
    """
    base.requires_grad_(False)
    chosen = _chosen(base, method)
    if not chosen:
        raise ModelError(
            "method.name=freeze",
            f"leaves no weight of this {type(base).__name__} to train",
            "write less in method.freeze, or more in method.train, head or last",
        )
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in chosen)
    return base


def unfreezing_groups(model: nn.Module, method: FreezeMethod) -> dict[str, ParamGroup]:
    """Gradual unfreezing (arXiv 1801.06146): weights above the blocks and in the topmost trained
    block train at once, the next block below after `method.unfreeze_every_examples` examples and
    so on, and embeddings after all blocks.
    """
    if method.unfreeze_every_examples is None:
        return {}
    embeddings = _embeddings(model)
    owners = {
        n: _owner(n, find_blocks(model)) for n, p in model.named_parameters() if p.requires_grad
    }
    from_the_top = [b for b in reversed(find_blocks(model)) if b in owners.values()]
    stages = {block: number for number, block in enumerate(from_the_top)}
    return {
        name: ParamGroup(
            from_examples=method.unfreeze_every_examples
            * (len(stages) if name in embeddings else stages.get(owner or "", 0))
        )
        for name, owner in owners.items()
    }


def _chosen(base: nn.Module, method: FreezeMethod) -> set[str]:
    """Names of the trained weights; where several keys concern a weight, the later one decides."""
    blocks = find_blocks(base)
    trained = _trained_blocks(list(blocks), method, type(base).__name__)
    embeddings, norms = _embeddings(base), _norms(base)
    names = [name for name, _ in base.named_parameters()]
    chosen = set()
    for name in names:
        owner = _owner(name, blocks)
        if owner is not None:
            trains = owner in trained
        else:
            trains = method.embeddings if name in embeddings else method.head
        if name in norms and method.norms is not None:
            trains = method.norms
        if trains:
            chosen.add(name)
    chosen |= _matching("train", method.train, names, base)
    return chosen - _matching("freeze", method.freeze, names, base)


def _trained_blocks(names: list[str], method: FreezeMethod, model: str) -> list[str]:
    for key, count in (("first", method.first), ("last", method.last)):
        if count is not None and count > len(names):
            raise ModelError(
                f"method.{key}={count}",
                f"is more than the {len(names)} blocks of this {model}",
                f"write at most {len(names)}",
            )
    if method.last is not None:
        return names[len(names) - method.last :]
    return names[method.first or 0 :]


def _owner(name: str, blocks: Iterable[str]) -> str | None:
    return next((block for block in blocks if name.startswith(f"{block}.")), None)


def _embeddings(model: nn.Module) -> set[str]:
    """Tables of tokens and positions; the head may share its weight with one of them."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        for name, _ in module.named_parameters(recurse=False)
    }


def _norms(model: nn.Module) -> set[str]:
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }


def _matching(key: str, patterns: list[str], names: list[str], base: nn.Module) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if _matches(pattern, name)}
        if not matched:
            raise ModelError(
                f"method.{key}={pattern}",
                f"names no weight of this {type(base).__name__}",
                f"write names such as {', '.join(_nearest(pattern, names))}",
            )
        found |= matched
    return found


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern with `*`, `?` or `[` matches the whole name, or another one is consecutive
    parts of it.
    """
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _nearest(pattern: str, names: list[str]) -> list[str]:
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    near = difflib.get_close_matches(pattern, [*parts, *names], n=3)
    return near or list(parts)[:8]


FULL = Implementation(apply_full)
FREEZE = Implementation(apply_freeze, unfreezing_groups)
