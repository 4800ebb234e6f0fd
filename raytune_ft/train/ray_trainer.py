"""A worker group on Ray Train, started again as often as its failures allow."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raytune_ft.config.load import choose_strategy
from raytune_ft.config.schema import Config
from raytune_ft.ray_backend.worker import ProcessGroupConfig
from raytune_ft.ray_backend.worker_group import RunWatch, StartsInARow
from raytune_ft.train.ray_elastic import scaling_policy
from raytune_ft.train.spec import RunSpec

# A group that cannot start, because a node went away for good, is tried for ten minutes or so.
START_FAILURES = 10
GROW_AFTER_S = 60.0
"""Between two looks whether an elastic run can have more workers."""
ELASTIC_START_TIMEOUT_S = "20"
"""An elastic run that waits longer for a worker goes on with one less; else Ray waits 60 s."""
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


class _LeanTrainer(DataParallelTrainer):
    """Two processes less for each run, 1.5 s of a core each, and no torch beside the workers.

    There are no Ray Data sets. And the cleaner, which looks its cluster up through the State API
    and dies where a machine runs two of them, is what the switchboard replaces.
    """

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback)
        every = super()._create_default_callbacks()
        return [callback for callback in every if not isinstance(callback, idle)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(
            **{
                **arguments,
                "scaling_policy": scaling_policy(self.scaling_config),
                "failure_policy": StartsInARow(self.run_config.failure_config),
            }
        )


Worker = Callable[[dict[str, Any]], str]


def train_group(
    spec: RunSpec, name: str, switchboard: Any, worker: Worker, more: dict[str, Any]
) -> None:
    """Train `spec` as Ray's run `name`, and return when its last worker group is gone.

    Raises:
        TrainingFailedError: groups failed more often than `parallel.max_failures`.
    """
    parallel = spec.config.parallel
    size: int | tuple[int, int] = parallel.max_workers
    if parallel.elastic:
        size = parallel.min_workers, parallel.max_workers
        os.environ.setdefault(START_TIMEOUT, ELASTIC_START_TIMEOUT_S)
    resources = {key: amount for key, amount in parallel.resources_per_worker.items() if amount}
    gpu = resources.get("GPU", 0) > 0
    # Ray's own notes on the run: nothing that anybody reads afterwards.
    storage = tempfile.mkdtemp(prefix="raytune-ft-")
    try:
        _LeanTrainer(
            worker,
            train_loop_config={"spec": spec, "run": name, "switchboard": switchboard, **more},
            backend_config=_process_group(spec.config, gpu),
            scaling_config=ScalingConfig(
                num_workers=size,
                use_gpu=gpu,
                resources_per_worker=resources,
                elastic_resize_monitor_interval_s=GROW_AFTER_S,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage,
                failure_config=FailureConfig(
                    max_failures=parallel.max_failures,
                    controller_failure_limit=START_FAILURES,
                ),
                callbacks=[RunWatch(name, switchboard)],
            ),
        ).fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _process_group(config: Config, gpu: bool) -> BackendConfig:
    """A worker of its own needs none; a group of one does, where its strategy is one of groups."""
    if choose_strategy(config)[0] == "single":
        return BackendConfig()
    # A hang is to be found, and told, before a collective gives up by itself.
    timeout_s = max(1800, int(2 * config.parallel.hang_timeout_s))
    return ProcessGroupConfig("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s)
