"""Where workers compute: on a GPU each where there are any, said in the first line, never silently
on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft import app
from raytune_ft.config.load import load_config
from raytune_ft.config.schema import Config, ParallelConfig
from raytune_ft.errors import ClusterError, ConfigError
from raytune_ft.preflight import on_devices, placed
from raytune_ft.strategy.single import Single
from raytune_ft.train.report import Silent
from tests.support.runs import write_rows

KEY = "parallel.resources_per_worker"
LOCAL_GPUS = "raytune_ft.estimate.hardware.visible_gpus"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl", 40)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
        name: a
        storage: {tmp_path}/runs
        data: {{train: {{path: {tmp_path}/rows.jsonl}}}}
        search: {{trials: 2, budget: {{gpu_hours: 1}}, space: {{train.lr: {{choice: [1e-3]}}}}}}
        """
    )
    return path


def nodes(*gpus: float) -> list[dict[str, Any]]:
    """Nodes as Ray describes them; each that has GPUs is in zone a."""
    return [
        {
            "Alive": True,
            "NodeID": f"{number}",
            "NodeManagerAddress": f"10.0.0.{number}",
            "Resources": {"CPU": 8.0} | ({"GPU": each} if each else {}),
            "Labels": {"zone": "a" if each else "b"},
        }
        for number, each in enumerate(gpus)
    ]


@pytest.mark.parametrize(
    ("overrides", "there", "resources", "line"),
    [
        ([], 0, {"CPU": 1, "GPU": 0}, "workers compute on CPUs: this machine has none"),
        ([], 2, {"CPU": 1, "GPU": 1}, "each worker computes on a GPU: this machine has 2"),
        (
            [f"{KEY}.CPU=4"],
            2,
            {"CPU": 4, "GPU": 1},
            "each worker computes on a GPU: this machine has 2",
        ),
        ([f"{KEY}.GPU=0"], 2, {"CPU": 1, "GPU": 0}, f"workers compute on CPUs: {KEY}.GPU=0"),
        (
            [f"{KEY}.GPU=0.5"],
            0,
            {"CPU": 1, "GPU": 0.5},
            f"each worker computes on 0.5 of a GPU: {KEY}.GPU=0.5",
        ),
        (
            ["parallel.accelerator=H100"],
            0,
            {"CPU": 1, "GPU": 1},
            "each worker computes on a GPU: parallel.accelerator=H100",
        ),
    ],
)
def test_auto_is_one_gpu_where_this_machine_has_any(
    file: Path,
    overrides: list[str],
    there: int,
    resources: dict[str, float],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LOCAL_GPUS, lambda: there)
    written = load_config(file, overrides, ignore_search=True)
    found, told = on_devices(written, joined=False)
    assert found.parallel.resources_per_worker == resources
    assert told == line


def test_auto_looks_at_the_nodes_of_a_cluster_that_suit(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOCAL_GPUS, lambda: 8)
    monkeypatch.setattr("ray.nodes", lambda: nodes(0, 4, 4))

    def device(*overrides: str) -> tuple[str, str]:
        found, told = on_devices(load_config(file, overrides), joined=True)
        return found.parallel.device, told

    assert device() == ("cuda", "each worker computes on a GPU: the nodes that suit have 8")
    away = "parallel.label_selector.zone=b"
    none = "workers compute on CPUs: the nodes that suit have none"
    with pytest.raises(ConfigError, match=r"gpu_hours=1 counts GPUs, and .* has none"):
        device(away)
    assert device(away, "search.budget=null") == ("cpu", none)


def test_it_is_the_first_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOCAL_GPUS, lambda: 2)
    told: list[str] = []
    with placed(load_config(file, ignore_search=True), None, told.append) as (config, _):
        assert config.parallel.resources == {"CPU": 1.0, "GPU": 1.0}
    assert told == ["each worker computes on a GPU: this machine has 2"]


def test_a_run_that_is_kept_off_gpus_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)

    def device(**written: Any) -> str:
        return Single(ParallelConfig(**written), "float32").device.type

    assert device(resources_per_worker={"CPU": 1, "GPU": 0}) == "cpu"
    assert device(resources_per_worker={"CPU": 1, "GPU": 1}) == "cuda"


def test_a_run_that_asks_for_a_gpu_is_not_trained_without(file: Path, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(ClusterError) as refused:
        app.train(file, [f"{KEY}.GPU=1"], False, told.append, lambda total: Silent())
    assert f"{KEY}.GPU=1 and torch " in str(refused.value)
    assert "sees no GPU on this machine; install the build of torch for its driver, or" in str(
        refused.value
    )
    assert not list(tmp_path.glob("runs/a/metrics.jsonl"))


def test_the_resolved_config_is_concrete(file: Path) -> None:
    config: Config
    with placed(load_config(file, ignore_search=True)) as (config, _):
        assert isinstance(config.parallel.resources_per_worker, dict)
