"""A cluster whose node says that it has GPUs, and where `vllm` is a stand-in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prompts import prompted
from raytune_ft.model.load import load_tokenizer
from raytune_ft.model.sampling import Request
from raytune_ft.ray_backend.vllm import seed_of
from raytune_ft.rundir import RunSpec
from tests.support.clusters import joined_cluster
from tests.support.objectives import config_of, save_inputs
from tests.support.runs import run

FAKE = Path(__file__).parents[1] / "support" / "fake_vllm"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="package", autouse=True)
def cluster() -> Iterator[None]:
    found = [str(FAKE), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    with joined_cluster({"num_cpus": 4, "num_gpus": 2}, {"PYTHONPATH": os.pathsep.join(found)}):
        yield


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("inputs"))


# In float32, so that draws agree; vLLM's own kernels compute adapters in bfloat16 alone.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"name": "lora", "rank": 4, "init": "pissa"}},
    # The gradients of some weights are rounding alone, which AdamW with its usual epsilon makes as
    # large as any other: 2e-4 between one process and two in float32, and 2e-14 in float64.
    "full": {"method": {"name": "full"}, "train.lr": 1e-3, "train.adam_epsilon": 1e-4},
}


class Runs:
    """Runs of one small config, by vLLM and by the model itself."""

    def __init__(self, folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._scratch, self._patch = folder, scratch, monkeypatch

    def config(self, method: str, objective: str = "grpo", **changes: Any) -> Any:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        more = {"parallel.resources_per_worker": {"CPU": 1, "GPU": 0}, **METHODS[method], **dotted}
        return config_of(self._folder, objective, more)

    def spec(self, name: str, config: Any, **vllm: Any) -> RunSpec:
        """Of a run whose completions come from engines."""
        rollout = config.train.rollout.model_dump() | {"engine": "vllm", "vllm": vllm}
        train = config.train.model_dump() | {"rollout": rollout}
        config = type(config).model_validate(config.model_dump() | {"train": train})
        tokenizer = load_tokenizer(config.model)
        data = prepare_data(config.data, tokenizer, config.seed, self._scratch / "cache")
        data = prompted(config, data, tokenizer)
        run_dir = self._scratch / name
        run_dir.mkdir()
        return RunSpec(config, run_dir, data.path)

    def embedded(self, name: str, config: Any) -> Path:
        """The same run by the model itself, with the numbers that the stand-in draws."""

        def numbers(seed: int, request: Request, limit: int) -> Any:
            return np.random.default_rng(seed_of(seed, request)).random(limit)

        with self._patch.context() as patch:
            patch.setattr("raytune_ft.model.sampling.numbers_of", numbers)
            run(config, self._scratch / name)
        return self._scratch / name


@pytest.fixture
def runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(folder, tmp_path, monkeypatch)
