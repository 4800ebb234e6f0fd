"""How many trials share an engine. Imports neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_ft.config.execution import variants
from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.schema import Config

MAX_SLOTS = 16
"""More slots cost memory and gain little: a forward pass is large enough by then."""
TRIALS_PER_SLOT = 6
"""A slot costs a process of Ray Tune, about 2 s of one core, which fewer trials do not save."""


@dataclass(frozen=True)
class Arrangement:
    """`at_once` trials in `engines` worker groups of `slots` slots each, for adapters up to the
    rank of `method`. `measured`: the engine measures whether fewer slots are as fast.
    """

    at_once: int
    engines: int
    slots: int
    method: LoraMethod
    measured: bool


def arrange(config: Config, fit: int, trials: int, fill_pass: int) -> Arrangement:
    """Engines and slots for `trials` trials on a cluster that holds `fit` worker groups.

    `fill_pass` is the number of trials whose steps fill one forward pass. There are at least two
    slots, so that an engine has work while Ray Tune asks for the next trial.
    """
    assert config.search is not None
    written = config.search.max_concurrent
    useful = max(2, min(MAX_SLOTS, trials // (fit * TRIALS_PER_SLOT), fill_pass))
    at_once = min(fit * useful if written == "auto" else written, trials)
    engines = min(fit, at_once)
    methods = [each.method for each in variants(config) if isinstance(each.method, LoraMethod)]
    largest = max(methods, key=lambda method: method.rank)
    return Arrangement(at_once, engines, -(-at_once // engines), largest, written == "auto")
