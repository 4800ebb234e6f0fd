"""What runs inside a Ray Train worker. Importing this module loads no torch."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

from raytune_ft.config.load import choose_strategy
from raytune_ft.records import EvalMetrics, StepMetrics
from raytune_ft.train.spec import RunSpec


class RayReporter:
    """Evaluations go to Ray Train, on every rank, since `ray.train.report` is a barrier.

    Steps do not: Ray drains one report at a time, and `metrics.jsonl` has them already.
    """

    def step(self, metrics: StepMetrics) -> None:
        """Nothing."""

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        """The checkpoint is committed before, so that whoever stops the run finds it whole."""
        ray.train.report({**asdict(metrics), "checkpoint": checkpoint})


def train_worker(payload: dict[str, Any]) -> None:
    """The function of each worker: threads and devices as reserved, then the run itself."""
    spec: RunSpec = payload["spec"]
    resources = spec.config.parallel.resources_per_worker
    if not resources.get("GPU", 0):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides GPUs only from workers that have some
    import torch

    # OMP_NUM_THREADS comes too late in a process that was started before it was leased.
    torch.set_num_threads(max(1, int(resources.get("CPU", 1))))
    if torch.cuda.is_available():
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())

    from raytune_ft.train.run import run_training

    run_training(spec, choose_strategy(spec.config)[0], RayReporter())


@dataclass
class ProcessGroupConfig(BackendConfig):
    """Ray's TorchConfig, less the import of torch in every process that merely unpickles it.

    Ray's own loads torch into the controller of each run, which takes 1.5 s of a core and stands
    in the way of the workers' start. Here only the workers load it, and call Ray's functions.
    """

    backend: str = "gloo"
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> type[Backend]:
        """See `BackendConfig`."""
        return ProcessGroupBackend


class ProcessGroupBackend(Backend):
    """Sets up `torch.distributed` between the workers; a group of one does without."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:
        """Called in the controller once the workers are there."""
        size = len(worker_group)
        if size == 1:
            return
        from ray.train._internal.utils import get_address_and_port

        address, port = worker_group.execute_single(0, get_address_and_port)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join_process_group, address, port, rank, size, backend_config
                )
                for rank in range(size)
            ]
        )


def _join_process_group(
    address: str, port: int, rank: int, size: int, config: ProcessGroupConfig
) -> None:
    from ray.train.torch.config import (
        _set_torch_distributed_env_vars,
        _setup_torch_process_group,
    )

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(config.backend, rank, size, "env://", config.timeout_s)
