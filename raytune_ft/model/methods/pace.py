"""How fast a trained weight moves, and from when on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Its rate is `lr_ratio` times the run's; it rests until the run has seen `from_examples`."""

    lr_ratio: float = 1.0
    from_examples: int = 0
