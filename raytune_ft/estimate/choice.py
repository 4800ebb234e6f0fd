"""What `parallel.strategy: auto` needs to know of memory."""

from __future__ import annotations

from raytune_ft.config.schema import Config
from raytune_ft.estimate.hardware import GIB, PROCESS
from raytune_ft.estimate.memory import MemoryModel, held_by
from raytune_ft.estimate.parameters import build_shell
from raytune_ft.estimate.teacher import teaching_of
from raytune_ft.estimate.work import work_at_most
from raytune_ft.train.objective import head_before


def shortage(config: Config, usable: int | None) -> str | None:
    """Why a whole copy of the base does not fit on a worker; None where it does.

    Where not even sharding the base makes room, what lacks room is something else (activations),
    and the base alone is asked about. Memory that nobody knows is presumed to do.

    Raises:
        ModelError: the model cannot be read, or cannot take the method.
    """
    if usable is None:
        return None
    parallel = config.parallel
    device = "cuda" if parallel.resources_per_worker.get("GPU", 0) > 0 else "cpu"
    shell = build_shell(config.model, config.method, config.train.precision, head_before(config))
    work = work_at_most(config, parallel.max_workers, device)
    plain = parallel.model_copy(update={"strategy": "ddp"})
    teaching = teaching_of(config)
    needed = held_by(shell, plain).resident + (teaching.held if teaching is not None else 0)
    if needed <= usable:
        model = MemoryModel(shell, (work.rows,), work.width, teaching)
        parts = parallel.model_copy(update={"strategy": "fsdp"})
        needed, shared = (
            model.estimate(layout, work, device).peak + PROCESS[device] for layout in (plain, parts)
        )
        if needed <= usable or shared > usable:
            return None
    return f"a whole copy needs {needed / GIB:,.1f} GiB of a worker's {usable / GIB:,.1f}"
