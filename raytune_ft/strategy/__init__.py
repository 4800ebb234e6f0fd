"""How one optimizer step is spread over processes; one file each, one contract for all."""

from __future__ import annotations

from raytune_ft.strategy.base import MOMENTS, OptimizerOf, Strategy
from raytune_ft.strategy.ddp import Ddp
from raytune_ft.strategy.deepspeed import DeepSpeed
from raytune_ft.strategy.fsdp import Fsdp
from raytune_ft.strategy.single import Single

STRATEGIES: dict[str, type[Strategy]] = {
    "single": Single,
    "ddp": Ddp,
    "fsdp": Fsdp,
    "deepspeed": DeepSpeed,
}

__all__ = ["MOMENTS", "STRATEGIES", "OptimizerOf", "Strategy"]
