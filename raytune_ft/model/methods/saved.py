"""Adapters that cannot be folded into their base: which these are, and the way back from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from raytune_ft.config.methods import (
    AdapterMethod,
    LoreftMethod,
    Positions,
    PrefixMethod,
    PromptMethod,
)
from raytune_ft.errors import CheckpointError, first_line
from raytune_ft.files import read_json
from raytune_ft.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from raytune_ft.model.methods.bottleneck import apply_adapter
from raytune_ft.model.methods.hooks import attached
from raytune_ft.model.methods.loreft import apply_loreft
from raytune_ft.model.methods.prefix import apply_prefix
from raytune_ft.model.methods.virtual import apply_prompt

Written = Mapping[str, Any]


def _loreft(base: nn.Module, written: Written) -> None:
    own = {key: written[key] for key in ("rank", "layers", "tied")}
    positions = Positions(**written["positions"])
    apply_loreft(base, LoreftMethod(name="loreft", positions=positions, **own))


def _adapter(base: nn.Module, written: Written) -> None:
    own = {key: written[key] for key in ("bottleneck", "after", "activation", "layers")}
    apply_adapter(base, AdapterMethod(name="adapter", **own))


def _prompt(base: nn.Module, written: Written) -> None:
    apply_prompt(base, PromptMethod(name="prompt", tokens=written["num_virtual_tokens"]))


def _prefix(base: nn.Module, written: Written) -> None:
    apply_prefix(base, PrefixMethod(name="prefix", tokens=written["num_virtual_tokens"]))


_KINDS: dict[str, Callable[[nn.Module, Written], None]] = {
    "loreft": _loreft,
    "adapter": _adapter,
    "PROMPT_TUNING": _prompt,
    "P_TUNING": _prompt,  # of its MLP only what it computes is on disk
    "PREFIX_TUNING": _prefix,
}


def unfoldable(directory: Path) -> str | None:
    """What kind of adapter without a delta of weights lies in a directory; None: no such one."""
    if (directory / "config.json").is_file() or not (directory / ADAPTER_WEIGHTS).is_file():
        return None
    written = _read(directory)
    kind = written.get("method") or written.get("peft_type")
    return kind if kind in _KINDS else None


def attach_saved(base: nn.Module, directory: Path) -> None:
    """Put such an adapter into the model that it was trained on.

    Raises:
        CheckpointError: it cannot be read, or is of another model.
    """
    kind = unfoldable(directory)
    assert kind is not None
    try:
        _KINDS[kind](base, _read(directory))
        found = attached(base)
        assert found is not None
        found.fill(load_file(directory / ADAPTER_WEIGHTS))
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{directory} is no adapter of its base: {reason}") from error


def _read(directory: Path) -> dict[str, Any]:
    try:
        written = read_json(directory / ADAPTER_CONFIG)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / ADAPTER_CONFIG} cannot be read: {error}") from error
    if not isinstance(written, dict):
        raise CheckpointError(f"{directory / ADAPTER_CONFIG} holds no mapping")
    return written
