"""Spans of time as people write them."""

from __future__ import annotations

import math
import re

from raytune_ft.config.explain import shown_value
from raytune_ft.errors import ConfigError

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")


def duration_s(value: float | str, key: str = "search.budget.wall_s") -> float:
    """Seconds of a number, or of a text such as `90s`, `1.5h` or `2d`; ConfigError otherwise."""
    found = _WRITTEN.fullmatch(value) if isinstance(value, str) else None
    seconds = float(found[1]) * UNITS_S[found[2]] if found else value
    if isinstance(seconds, str) or not 0 < seconds < math.inf:
        raise ConfigError(
            f"{key}={shown_value(value)}", "is no span of time", "write seconds, or 90m, 2h, 1d"
        )
    return float(seconds)
