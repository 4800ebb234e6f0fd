"""Every weight."""

from __future__ import annotations

from typing import Any

from torch import nn


def apply_full(base: nn.Module, method: Any) -> nn.Module:
    """Every weight moves."""
    base.requires_grad_(True)
    return base
