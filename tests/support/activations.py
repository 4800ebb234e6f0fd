"""One small config for each method that works on activations."""

from __future__ import annotations

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "loreft": {"name": "loreft", "rank": 3, "positions": {"first": 3, "last": 2}},
    "adapter": {"name": "adapter", "bottleneck": 6},
    "prompt": {"name": "prompt", "tokens": 5},
    "p_tuning": {"name": "p_tuning", "tokens": 5, "hidden": 16},
    "prefix": {"name": "prefix", "tokens": 5, "projection": True},
}
