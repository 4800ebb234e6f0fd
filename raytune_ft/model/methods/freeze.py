"""Chosen weights of the model itself."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from raytune_ft.config.methods import FreezeMethod
from raytune_ft.errors import ModelError
from raytune_ft.model.blocks import find_blocks


def apply_full(base: nn.Module, method: Any) -> nn.Module:
    """Every weight moves."""
    base.requires_grad_(True)
    return base


@dataclass(frozen=True)
class Pace:
    """Its rate is `lr_ratio` times the run's; it rests until the run has seen `from_examples`."""

    lr_ratio: float = 1.0
    from_examples: int = 0


def apply_freeze(base: nn.Module, method: FreezeMethod) -> nn.Module:
    """The weights that `method` chooses move, the others stay.

    Raises:
        ModelError: a pattern or a number of blocks is none of the model's, or nothing is left.
    """
    base.requires_grad_(False)
    chosen = _chosen(base, method)
    if not chosen:
        raise ModelError(
            "method.name=freeze",
            f"leaves no weight of this {type(base).__name__} to train",
            "write fewer of method.freeze, or some of method.train, head or last",
        )
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in chosen)
    return base


def freeze_paces(model: nn.Module, method: FreezeMethod) -> dict[str, Pace]:
    """Gradual unfreezing (arXiv 1801.06146): what lies above the blocks and the topmost of those
    that train move at once, one more block after every so many examples, embeddings after all.
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
        name: Pace(
            from_examples=method.unfreeze_every_examples
            * (len(stages) if name in embeddings else stages.get(owner or "", 0))
        )
        for name, owner in owners.items()
    }


def _chosen(base: nn.Module, method: FreezeMethod) -> set[str]:
    """Where several keys speak of a weight, the later ones decide."""
    blocks = find_blocks(base)
    moving = _moving_blocks(list(blocks), method, type(base).__name__)
    embeddings, norms = _embeddings(base), _norms(base)
    names = [name for name, _ in base.named_parameters()]
    chosen = set()
    for name in names:
        owner = _owner(name, blocks)
        if owner is not None:
            moves = owner in moving
        else:
            moves = method.embeddings if name in embeddings else method.head
        if name in norms and method.norms is not None:
            moves = method.norms
        if moves:
            chosen.add(name)
    chosen |= _matching("train", method.train, names, base)
    return chosen - _matching("freeze", method.freeze, names, base)


def _moving_blocks(names: list[str], method: FreezeMethod, model: str) -> list[str]:
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
    """Tables that tokens and positions are looked up in; a head may be one of them."""
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
    """Whole names with `*`, `?` and `[...]`, or parts of a name in the order that they have."""
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _nearest(pattern: str, names: list[str]) -> list[str]:
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    near = difflib.get_close_matches(pattern, [*parts, *names], n=3)
    return near or list(parts)[:8]
