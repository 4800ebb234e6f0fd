"""How many trials share an engine. Pure: no torch, no ray."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_ft.config.execution import variants
from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.schema import Config

MAX_SLOTS = 16
"""More slots cost more memory and gain little: a pass is large enough by then."""
TRIALS_PER_SLOT = 6
"""A slot costs a process of Ray Tune's, about 2 s of a core, which fewer trials do not earn."""


@dataclass(frozen=True)
class Arrangement:
    """`at_once` trials in `engines` worker groups of `slots` slots each, for adapters up to that of
    `method`. `measured`: an engine is to find out whether fewer slots do as well.
    """

    at_once: int
    engines: int
    slots: int
    method: LoraMethod
    measured: bool


def arrange(config: Config, fit: int, trials: int, fill_pass: int) -> Arrangement:
    """Engines and slots for `trials` trials on a cluster that holds `fit` worker groups.

    `fill_pass`: so many steps of usual trials fill a pass. One trial more waits at least, so that
    no engine stands still while Ray Tune thinks of the next.
    """
    assert config.search is not None
    written = config.search.max_concurrent
    useful = max(2, min(MAX_SLOTS, trials // (fit * TRIALS_PER_SLOT), fill_pass))
    at_once = min(fit * useful if written == "auto" else written, trials)
    engines = min(fit, at_once)
    methods = [each.method for each in variants(config) if isinstance(each.method, LoraMethod)]
    largest = max(methods, key=lambda method: method.rank)
    return Arrangement(at_once, engines, -(-at_once // engines), largest, written == "auto")
