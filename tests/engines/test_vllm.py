"""Rollouts from engines on Ray actors: weights, seeds, lost engines, engines that do not hear."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from raytune_ft.errors import RunFailed
from raytune_ft.layout import ROLLOUTS
from raytune_ft.ray_backend.run_handle import fit
from raytune_ft.ray_backend.vllm import RESTARTS
from tests.engines.conftest import Runs
from tests.ray.conftest import processes
from tests.support.runs import largest_difference, metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOLERANCE = 1e-4  # float32; copies compute rows alone


def completions(run_dir: Path) -> list[tuple[int, str]]:
    lines = (run_dir / ROLLOUTS).read_text().splitlines()
    return [(row["step"], row["completion"]) for row in map(json.loads, lines)]


def assert_gpus_are_free() -> None:
    """Ray counts what was freed a bit later."""
    deadline = time.monotonic() + 10
    while (free := ray.available_resources().get("GPU")) != 2:
        assert time.monotonic() < deadline, free
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("method", "workers", "strategy", "engines"),
    [
        ("lora", 2, "ddp", 1),
        ("lora", 1, "single", 2),
        ("full", 2, "fsdp", 1),
        ("full", 2, "deepspeed", 1),
    ],
)
def test_a_run_with_engines_is_that_of_the_model_itself(
    runs: Runs, method: str, workers: int, strategy: str, engines: int
) -> None:
    config = runs.config(method)
    alone = runs.embedded("alone", config)
    spec = runs.spec(
        "vllm",
        runs.config(method, parallel__workers=workers, parallel__strategy=strategy),
        engines=engines,
    )
    told: list[str] = []
    assert fit(spec, tell=told.append).status == "completed"
    assert any(line.startswith("vLLM 0.30.0") for line in told)
    assert completions(spec.run_dir) == completions(alone)
    assert max(largest_difference(spec.run_dir, alone)) < TOLERANCE
    steps = [line for line in metrics(spec.run_dir) if "loss" in line]
    assert all(line["logp_gap"] < TOLERANCE for line in steps)
    assert_gpus_are_free()


def test_a_run_with_engines_learns(runs: Runs) -> None:
    config = runs.config(
        "lora",
        train__rollout={"num_generations": 8, "max_completion_length": 8, "eval_completions": 4},
        train__grpo={},
        train__lr=1e-2,
        train__max_examples=7 * 25,
        train__eval_every_examples=7 * 25,
    )
    spec = runs.spec("run", config)
    assert fit(spec).status == "completed"
    first, last = [line["eval_reward"] for line in metrics(spec.run_dir) if "eval_reward" in line]
    assert last > first + 0.5


def test_rounding_in_bfloat16_is_no_fault(runs: Runs) -> None:
    """The engine holds base and adapter in bfloat16, training the adapter in float32."""
    spec = runs.spec("run", runs.config("lora", train__precision="bfloat16"))
    assert fit(spec).status == "completed"
    gaps = [line["logp_gap"] for line in metrics(spec.run_dir) if "loss" in line]
    assert 1e-4 < max(gaps) < 0.05
    print("largest gap", max(gaps))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_engine_that_ignores_weights_ends_the_run(
    runs: Runs, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = tmp_path / "fault"
    monkeypatch.setenv("VLLM_FAKE_FAULT", f"deaf:{fault}")
    result = fit(runs.spec("run", runs.config(method, train__lr=3e-2)))
    assert fault.read_text().count("deaf") > 1
    assert result.status == "failed"
    assert result.error is not None
    assert "the copies that sample do not have the weights of the model in training" in result.error
    assert "and 0.05 is allowed" in result.error


def test_a_killed_engine_is_started_again_and_the_numbers_stay(runs: Runs) -> None:
    config = runs.config("lora")
    alone = runs.embedded("alone", config)
    killed: list[int] = []

    def kill(*_: Any) -> None:
        if not killed:
            (process,) = processes("ray::Engine")
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    spec = runs.spec("run", config)
    assert fit(spec, kill).status == "completed"
    assert killed
    assert completions(spec.run_dir) == completions(alone)
    assert max(largest_difference(spec.run_dir, alone)) < TOLERANCE


@pytest.mark.parametrize("kind", ["dies_once", "dies"])
def test_an_engine_that_dies_while_it_samples(
    runs: Runs, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = tmp_path / "fault"
    monkeypatch.setenv("VLLM_FAKE_FAULT", f"{kind}:{fault}")
    result = fit(runs.spec("run", runs.config("lora")))
    if kind == "dies_once":
        assert fault.read_text().count(kind) == 1
        assert result.status == "completed"
        return
    assert fault.read_text().count(kind) == RESTARTS + 1
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.startswith("RunFailed: an engine of vLLM was lost")
    assert "\n" not in result.error


def test_a_model_that_vllm_refuses_ends_the_run_before_workers_start(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.ray_backend.vllm.Engine.ready", _refuses)
    with pytest.raises(RunFailed, match="vLLM: ValueError: no such architecture"):
        fit(runs.spec("run", runs.config("lora")))
    assert_gpus_are_free()


def _refuses(engine: Any) -> str:
    raise ValueError("no such architecture\nand more")
