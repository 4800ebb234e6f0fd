"""How numbers and names are written for people: in messages, reports, model cards and plans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

GIB = 2**30
"""Bytes."""
NONE = "-"
NOT_FINITE = "not finite"


def number(value: float | None) -> str:
    """Four decimals; three significant digits below 0.01 and from a million on.

    NaN and the infinities are `not finite`, as is None, by which files hold them.
    """
    if value is None or not math.isfinite(value):
        return NOT_FINITE
    return f"{value:.4f}" if 0.01 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"


def cell(value: Any) -> str:
    """Any value of a table: `-` for None, a float as `number`, an int with thousands separated."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def interval(ends: Sequence[float] | None) -> str:
    """`0.1000 to 0.2000`; None is an interval that too few examples do not give."""
    return "too few examples" if ends is None else " to ".join(map(number, ends))


def some_of(names: Sequence[str], most: int) -> str:
    """The first `most` names, and how many there are beside them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def params_text(values: Mapping[str, Any]) -> str:
    """Parameters of a trial: `train.lr=0.000123 method.rank=8`."""
    return " ".join(f"{key}={cell(value)}" for key, value in values.items())


def size(count: int | None) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    amount, unit = float(count or 0), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:,.0f} {unit}" if unit == "bytes" else f"{amount:,.1f} {unit}"


def seconds(value: float) -> str:
    """A duration: `2.5 ms`, `40 s`, `12 min`, `3.1 h`."""
    if value < 0.1:
        return f"{value * 1000:.2g} ms"
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:,.0f} min" if value < 7200 else f"{value / 3600:,.1f} h"
