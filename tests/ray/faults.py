"""Functions of workers that are slow, hang or lack memory; Ray imports them by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from raytune_ft.ray_backend import worker as ray_worker

HUNG = "hung"
"""A file in the run's directory: it has hung, and will not again."""


def slow_worker(payload: dict[str, Any]) -> str:
    """So that there is time to do something to it, also on a busy machine."""
    return _worker(payload, lambda call: time.sleep(0.2))


def worker_that_hangs_once(payload: dict[str, Any]) -> str:
    """Rank 1 stands still in the forward of its 25th micro-batch."""
    import torch.distributed as dist

    file = payload["spec"].run_dir / HUNG

    def stand_still(call: int) -> None:
        if call == 25 and dist.get_rank() == 1 and not file.exists():
            file.touch()
            time.sleep(1000)

    return _worker(payload, stand_still)


def _worker(payload: dict[str, Any], before: Any) -> str:
    from raytune_ft.model.objectives import TokenObjective

    right, calls = TokenObjective.losses, [0]

    def losses(*arguments: Any) -> Any:
        calls[0] += 1
        before(calls[0])
        return right(*arguments)

    TokenObjective.losses = losses  # type: ignore[method-assign]
    return ray_worker.train_worker(payload)


def worker_short_of_memory(payload: dict[str, Any]) -> str:
    """Rank 1 has memory for 60 tokens a pass."""
    import torch.distributed as dist

    from raytune_ft.train.model_runner import ModelRunner

    def too_much(_: Any, inputs: Any) -> bool:
        return dist.get_rank() == 1 and inputs["input_ids"].numel() > 60

    _refuse(ModelRunner, "inputs", too_much)
    return ray_worker.train_worker(payload)


def engine_short_of_memory(payload: dict[str, Any]) -> str:
    """An engine with memory for two slots."""
    from raytune_ft.packed.engine import Passes
    from raytune_ft.ray_backend import packed_worker

    _refuse(Passes, "plan", lambda passes, _: passes.slots > 2)
    return packed_worker.engine_worker(payload)


def _refuse(owner: Any, name: str, too_much: Callable[[Any, Any], bool]) -> None:
    """Let a method run out of memory where its object and its result are `too_much`."""
    import torch

    right = getattr(owner, name)

    def method(self: Any, *arguments: Any) -> Any:
        made = right(self, *arguments)
        if too_much(self, made):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return made

    setattr(owner, name, method)
