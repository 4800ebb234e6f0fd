"""How the ranks of a group find each other: bound to their device, and at once or not at all."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raytune_ft.config.environment import ALLOCATOR
from raytune_ft.errors import ClusterError, RunFailed
from raytune_ft.ray_backend import worker
from raytune_ft.ray_backend.worker import (
    Meeting,
    ProcessGroupConfig,
    _join_process_group,
    _meet,
    prepare_process,
)
from tests.support.runs import make_config


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    """Of one rank, in a process that is no worker of Ray."""
    environment = "ray.train.torch.config._set_torch_distributed_env_vars"
    monkeypatch.setattr(environment, lambda: None)
    monkeypatch.setattr(worker, "_node", lambda: "node 10.0.0.1")
    for library in ("GLOO", "NCCL"):
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", worker._loopback_interface())
    return _meet(one_node=True)


def join(meeting: Meeting, gpus: float = 0.0) -> None:
    _join_process_group(meeting, 0, 1, ProcessGroupConfig(gpus, 60))


def test_a_group_has_been_used_before_training(meeting: Meeting) -> None:
    join(meeting)
    try:
        assert dist.get_backend() == "gloo"
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()


def test_a_group_on_gpus_is_bound_to_the_device_and_tried(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    tried: list[Any] = []
    ones = torch.ones
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cuda", 3))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **rest: given.update(rest))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(torch, "ones", lambda n, device: tried.append(str(device)) or ones(n))
    join(meeting, gpus=1.0)
    assert given["device_id"] == torch.device("cuda", 3)
    assert sorted(tried) == ["cpu", "cuda:3"]


def test_a_network_that_does_not_answer_is_named_in_time(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr(worker, "JOIN_S", 0.2)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **rest: over.wait(60))
    with pytest.raises(RunFailed) as failed:
        join(meeting)
    over.set()
    assert "rank 0 on node 10.0.0.1 does not reach the 1 workers over gloo within 0.2 s" in str(
        failed.value
    )


def test_what_the_library_says_is_told(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **rest: Any) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(RunFailed, match="no route to host; look at GLOO_SOCKET_IFNAME"):
        join(meeting)


def test_a_gpu_that_torch_does_not_see_is_refused_first(meeting: Meeting) -> None:
    with pytest.raises(ClusterError, match=r"GPU=1 and torch .* sees no GPU on node 10\.0\.0\.1"):
        join(meeting, gpus=1.0)


def test_the_allocator_of_a_worker_is_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives a worker nothing of the driver's environment."""
    for name in (*ALLOCATOR, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
    for name in ALLOCATOR:
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    prepare_process(make_config(tmp_path, tmp_path / "rows.jsonl"))
    assert os.environ[ALLOCATOR[0]] == "expandable_segments:True"
