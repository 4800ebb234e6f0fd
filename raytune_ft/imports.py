"""Imports of large libraries."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection while modules are imported, where it would take a tenth of the time:
    torch, transformers and PEFT make many objects, and all stay. What exists then is not searched
    afterwards either, so it belongs where a process has made nothing yet that could be garbage.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collected:
            gc.enable()
