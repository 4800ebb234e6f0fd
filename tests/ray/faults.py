"""Functions of workers that are slow, or that hang; Ray imports them by name."""

from __future__ import annotations

import time
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
