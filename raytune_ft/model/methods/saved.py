"""Saved adapters of methods on activations, which cannot be folded into their base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from raytune_ft.config.methods import METHODS, Method
from raytune_ft.errors import CheckpointError, first_line
from raytune_ft.files import read_json
from raytune_ft.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from raytune_ft.model.methods.base import Implementation
from raytune_ft.model.methods.hooks import attached


def unfoldable(directory: Path) -> str | None:
    """The kind of the adapter in a directory as its file names it, None if it can be folded."""
    if (directory / "config.json").is_file() or not (directory / ADAPTER_WEIGHTS).is_file():
        return None
    written = _read(directory)
    kind = written.get("method") or written.get("peft_type")
    return None if _method_of(kind) is None else str(kind)


def attach_saved(base: nn.Module, directory: Path) -> None:
    """Attach an adapter that cannot be folded to the model that it was trained on.

    Raises:
        CheckpointError: it cannot be read, or is of another model.
    """
    method = _method_of(unfoldable(directory))
    assert method is not None
    implementation: Implementation = method.implementation()
    assert implementation.restore is not None
    try:
        implementation.restore(base, _read(directory))
        found = attached(base)
        assert found is not None
        found.fill(load_file(directory / ADAPTER_WEIGHTS))
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{directory} is not an adapter of its base: {reason}") from error


def _method_of(kind: str | None) -> Method | None:
    found = (m for m in METHODS.values() if m.on_activations and m.saved_as == kind)
    return next(found, None)


def _read(directory: Path) -> dict[str, Any]:
    try:
        written = read_json(directory / ADAPTER_CONFIG)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / ADAPTER_CONFIG} cannot be read: {error}") from error
    if not isinstance(written, dict):
        raise CheckpointError(f"{directory / ADAPTER_CONFIG} holds no mapping")
    return written
