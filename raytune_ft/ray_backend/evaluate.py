"""Evaluates several models at the same time, in actors of the joined Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
import torch

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.errors import RaytuneFtError, RunFailed, first_line
from raytune_ft.evaluate.evaluate import Job, Measured, run_job
from raytune_ft.ray_backend.placement import actor_options


class Evaluator:
    """Evaluates one model in a process of its own, with one thread for each reserved CPU."""

    def measure(self, job: Job, threads: int) -> Measured | RaytuneFtError:
        """`run_job`; a RaytuneFtError is returned, because Ray would wrap a raised one."""
        torch.set_num_threads(threads)
        try:
            return run_job(job)
        except RaytuneFtError as error:
            return error


def joined() -> bool:
    """Whether this process is part of a Ray cluster."""
    return bool(ray.is_initialized())


def measure_all(jobs: Sequence[Job], parallel: ParallelConfig) -> list[Measured]:
    """The results of `run_job` for each job, in order.

    Each actor reserves what a worker does, on the nodes of workers.

    Raises:
        RunFailed: an actor was lost.
        RaytuneFtError: as `run_job` raises it.
    """
    cpus = parallel.resources_per_worker.get("CPU", 1.0)
    remote: Any = ray.remote(Evaluator).options(**actor_options(parallel))
    actors = [remote.remote() for _ in jobs]  # Ray starts as many as fit
    waiting = {
        actor.measure.remote(job, max(1, int(cpus))): number
        for number, (actor, job) in enumerate(zip(actors, jobs, strict=True))
    }
    results: dict[int, Measured | RaytuneFtError] = {}
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            number = waiting.pop(done)
            results[number] = ray.get(done)
            ray.kill(actors[number])  # frees its resources for a waiting actor
    except ray.exceptions.RayError as error:
        reason = first_line(error)
        raise RunFailed(f"an evaluation was lost: {reason}") from error
    finally:
        for number in waiting.values():
            ray.kill(actors[number])
    found: list[Measured] = []
    for number in range(len(jobs)):
        result = results[number]
        if isinstance(result, RaytuneFtError):
            raise result
        found.append(result)
    return found
