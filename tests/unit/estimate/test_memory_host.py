"""Host memory of a node: copies for checkpoints, and what is offloaded, of all its workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.estimate.hardware import GPU_PROCESS, Hardware, named
from raytune_ft.estimate.memory import Memory, MemoryModel, Work, misfit, on_hosts
from raytune_ft.estimate.parameters import Shell, build_shell
from raytune_ft.format import GIB
from raytune_ft.plan.make import Asked
from raytune_ft.plan.text import describe
from raytune_ft.preflight import lay_out, prepare
from raytune_ft.ray_backend.cluster import cluster_room
from tests.support.runs import make_config, write_rows
from tests.unit.plan.test_layouts import plan_of

pytestmark = pytest.mark.usefixtures("traced_once")
WORK = Work(rows=1, width=64, labels=8, micro_batches=1, step_tokens=64, step_labels=8)
FULL = {"method": {"name": "full"}, "parallel.strategy": "fsdp", "parallel.workers": 16}


def layout(**changes: object) -> ParallelConfig:
    plain = {"strategy": "fsdp", "workers": 16, "resources_per_worker": {"GPU": 1}}
    return ParallelConfig.model_validate(plain | changes)


@pytest.fixture(scope="module")
def shell() -> Shell:
    config = make_config(Path("builtin:tiny"), Path("rows.jsonl"), FULL)
    return build_shell(config.model, config.method, config.train.precision)


def estimated(shell: Shell, parallel: ParallelConfig) -> Memory:
    return MemoryModel(shell, (1,), 64, by_formula=True).estimate(parallel, WORK, "cuda")


def h100(host: int | None, nodes: int = 2) -> Hardware:
    return replace(named("H100", nodes, 8, "bfloat16"), host=host)


def test_each_worker_of_a_node_has_its_process_and_its_copy(shell: Shell) -> None:
    memory = estimated(shell, layout())
    assert memory.snapshot == pytest.approx(3 * 4 * shell.total / 16, rel=0.1)
    assert memory.offloaded == 0
    needed = on_hosts(memory, layout(), h100(None))
    assert needed == 8 * (GPU_PROCESS + memory.snapshot)
    alone = ParallelConfig.model_validate({"strategy": "single"})
    assert on_hosts(memory, alone, h100(None)) == GPU_PROCESS + memory.snapshot


def test_offloaded_state_is_there_too(shell: Shell) -> None:
    kept, moved = estimated(shell, layout()), estimated(shell, layout(offload="all"))
    assert moved.offloaded > 0
    more = on_hosts(moved, layout(offload="all"), h100(None)) - on_hosts(kept, layout(), h100(None))
    assert more == 8 * moved.offloaded


def test_a_layout_that_a_node_has_no_memory_for_is_rejected(shell: Shell) -> None:
    memory = estimated(shell, layout())
    needed = on_hosts(memory, layout(), h100(None))
    for enough in (None, needed):
        assert misfit(memory, layout(), h100(enough)) is None
    reason = misfit(memory, layout(), h100(needed - 1))
    assert reason is not None
    assert reason.startswith("does not fit: needs 16.0 GiB of a node's host memory, has 16.0")
    on_cpu = replace(h100(1), device="cpu")
    assert misfit(memory, layout(), on_cpu) is None  # counted as a worker's own memory


def test_plan_says_it_and_so_does_the_start_of_a_run(tmp_path: Path) -> None:
    asked = Asked(nodes=1, per_node=2, accelerator="H100")
    plan = plan_of(Path("builtin:tiny"), tmp_path, "full", asked)
    assert "host memory of a node: 4." in describe(plan)
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    gpus = {"parallel.resources_per_worker": {"CPU": 1.0, "GPU": 1.0}, "parallel.workers": 16}
    changes = FULL | gpus | {"train.batch_size": 16, "storage": str(tmp_path / "runs")}
    config = make_config(Path("builtin:tiny"), rows, changes)
    data = prepare(config, lambda line: None)
    said: list[str] = []
    layouts = lay_out(config, data, 80 * GIB, h100(15 * GIB), said.append)
    assert said[-1] == "full: does not fit: needs 16.0 GiB of a node's host memory, has 15.0"
    forecast = layouts["full"].forecast
    assert forecast is not None
    assert forecast.peak_flops == 989e12
    assert forecast.peak_gib is not None
    assert 0 < forecast.peak_gib < 1
    assert forecast.tokens_per_s is not None
    assert forecast.tokens_per_s > 0
    shell = build_shell(config.model, config.method, "float32")
    dense = 6 * (shell.total - 2 * shell.vocabulary * shell.hidden)
    assert 1.0 < forecast.flops_a_token / dense < 2.5  # beside it the head and attention
    lay_out(config, data, 80 * GIB, h100(20 * GIB), said.append)
    assert said[-1].startswith("passes of at most 16,384 tokens, activation checkpointing none")


def test_a_cluster_has_the_memory_of_its_smallest_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def room_of(*memories: float | None) -> int | None:
        nodes = [
            {"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
            | ({} if memory is None else {"memory": memory})
            for memory in memories
        ]
        alive = [type("Node", (), {"resources": node})() for node in nodes]
        monkeypatch.setattr("raytune_ft.ray_backend.cluster.suitable_nodes", lambda parallel: alive)
        return cluster_room(layout()).host

    assert room_of(900.0 * GIB, 500.0 * GIB) == 500 * GIB
    assert room_of(900.0 * GIB, None) is None
    assert room_of() is None
