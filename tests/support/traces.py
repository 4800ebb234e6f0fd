"""Traces of activations and rates of this machine, each made once in a process."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

from raytune_ft.estimate.activations import Plane, Traced, trace
from raytune_ft.estimate.hardware import measure
from raytune_ft.estimate.parameters import Shell

measured_once = cache(measure)
_MADE: dict[Any, Traced] = {}


def traced_once(shell: Shell, rows: Collection[int], width: int, *how: Any) -> Traced:
    """What `trace` gives. Its points are kept, since each takes half a second, and depends on no
    more than the modules, the shapes and the dtypes.
    """
    weights = [(name, p.shape, p.requires_grad) for name, p in shell.module.named_parameters()]
    model = repr((shell, shell.module, shell.module.config, weights))
    parts = []
    for count in {min(rows), max(rows)}:
        key = (model, count, width, *how)
        if key not in _MADE:
            _MADE[key] = trace(shell, [count], width, *how)
        parts.append(_MADE[key])
    if not all(part.exact for part in parts):
        return trace(shell, rows, width, *how)
    kept, peak = (
        Plane({at: size for part in parts for at, size in getattr(part, name).points.items()})
        for name in ("kept", "peak")
    )
    return Traced(width, kept, peak)
