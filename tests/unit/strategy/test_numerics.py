"""Switches of torch that decide how a GPU rounds, and what `train.deterministic` does with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.identity import config_sha256
from raytune_ft.config.schema import Config, ParallelConfig
from raytune_ft.errors import ConfigError
from raytune_ft.strategy import build_strategy
from raytune_ft.strategy.numerics import without_algorithm
from tests.support.runs import evaluations, losses, make_config, make_inputs, run

SHORT = {"train.max_examples": 28, "method.dropout": 0.1}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def config(inputs: tuple[Path, Path], deterministic: bool) -> Config:
    return make_config(*inputs, SHORT | {"train.deterministic": deterministic})


def test_no_run_has_tf32_or_the_attention_of_cudnn() -> None:
    """An image of NVIDIA's turns TF32 on for every process; torch prefers cuDNN on new GPUs."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    build_strategy("single", ParallelConfig(), "float32")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_deterministic_run_has_the_same_numbers_on_a_cpu(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    run(config(inputs, True), tmp_path / "a")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    run(config(inputs, False), tmp_path / "b")
    assert not torch.are_deterministic_algorithms_enabled()
    for values in (losses, evaluations):
        assert values(tmp_path / "a") == values(tmp_path / "b")


def test_a_resume_may_change_it(inputs: tuple[Path, Path]) -> None:
    assert config_sha256(config(inputs, True)) == config_sha256(config(inputs, False))


def test_an_operation_without_a_deterministic_algorithm_is_named(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: Any) -> None:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    monkeypatch.setattr("raytune_ft.train.run.train", train)
    with pytest.raises(ConfigError) as refused:
        run(config(inputs, True), tmp_path / "a")
    text = str(refused.value)
    assert text.startswith("train.deterministic=true forbids put_"), text
    assert text.endswith("; write train.deterministic: false")
    assert without_algorithm(RuntimeError("a peer is gone")) is None
