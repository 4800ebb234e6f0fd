"""Ways to shard under fsdp: replicas, weights kept gathered, weights in host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Config
from tests.support.distributed import run_distributed
from tests.support.runs import (
    BrokenRun,
    Recorder,
    largest_difference,
    make_config,
    run,
)

METHODS = ("lora", "full")
SHORT = {
    "train.max_examples": 7 * 12,
    "train.precision": "float32",
    "checkpoint.every_examples": 7 * 3,
    "checkpoint.asynchronous": False,
}
LAYOUTS: list[dict[str, Any]] = [
    {"parallel.workers": 4, "parallel.replicas": 2, "train.micro_tokens": 48},
    {"parallel.workers": 2, "parallel.reshard_after_forward": False},
    {"parallel.workers": 2, "parallel.offload": "all"},
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, inputs: tuple[Path, Path]) -> Path:
    root = tmp_path_factory.mktemp("reference")
    for method in METHODS:
        run(_config(inputs, method, {}), root / method)
    return root


def _config(inputs: tuple[Path, Path], method: str, layout: dict[str, Any]) -> Config:
    strategy = {"parallel.strategy": "fsdp"} if layout else {}
    return make_config(*inputs, SHORT | {"method": {"name": method}} | strategy | layout)


def _run_all(inputs: tuple[Path, Path], root: Path, layout: dict[str, Any]) -> None:
    """In two goes, since what is loaded must reach weights that were gathered before."""
    for method in METHODS:
        config = _config(inputs, method, layout)
        with pytest.raises(BrokenRun):
            run(config, root / method, "fsdp", Recorder(fail_at=8))
        run(config, root / method, "fsdp", resumes=True)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ways_to_shard(
    tmp_path: Path, inputs: tuple[Path, Path], reference: Path, layout: dict[str, Any]
) -> None:
    run_distributed(_run_all, layout["parallel.workers"], inputs, tmp_path, layout)
    for method in METHODS:
        differences = largest_difference(tmp_path / method, reference / method)
        assert max(differences) < 1e-5, (method, differences)
    state = max((tmp_path / "full" / "checkpoints").glob("step-*")) / "state"
    sizes = [path.stat().st_size for path in sorted(state.glob("optimizer-*.safetensors"))]
    replicas = layout.get("parallel.replicas", 1)
    assert sum(size > 10_000 for size in sizes) == layout["parallel.workers"] / replicas
