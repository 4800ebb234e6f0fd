"""What the torch part of a method provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ParamGroup:
    """Optimizer settings of some trained weights that differ from those of the run.

    Their learning rate is `lr_ratio` times that of the run. They neither move nor decay until the
    run has seen `from_examples` examples.
    """

    lr_ratio: float = 1.0
    from_examples: int = 0


def _one_group(model: nn.Module, method: Any) -> dict[str, ParamGroup]:
    """All trained weights have the settings of the run."""
    return {}


@dataclass(frozen=True)
class Implementation:
    """The functions of one method. `method` is its section of the config.

    attach: changes the base in place, or wraps it, so that exactly the weights of the method
        require a gradient. New weights are drawn from torch's global generator. Raises ModelError
        where the model cannot take the method.
    groups: by name, the trained weights whose optimizer settings differ from those of the run.
    restore: of a method on activations, attaches what an adapter_config.json describes; the weights
        are filled in afterwards. Raises KeyError or ValueError where the file is of another kind.
    """

    attach: Callable[[nn.Module, Any], nn.Module]
    groups: Callable[[nn.Module, Any], dict[str, ParamGroup]] = _one_group
    restore: Callable[[nn.Module, Mapping[str, Any]], None] | None = None
