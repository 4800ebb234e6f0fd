"""Which weights text reaches is read off the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytune_ft.config.methods import FullMethod, LoraMethod
from raytune_ft.config.schema import ModelConfig
from raytune_ft.model.load import Precision, build_model
from raytune_ft.model.probe import unreached
from tests.support.models import FAMILIES, save_tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_decoder(tmp_path: Path, family: str) -> None:
    model = ModelConfig(path=str(save_tiny(family, tmp_path / "base")))
    precisions: tuple[Precision, ...] = ("float32", "bfloat16", "float64")
    for precision in precisions:
        for method in (LoraMethod(rank=2), FullMethod(name="full")):
            assert unreached(build_model(model, method, precision, 0), CPU, precision) == []


def test_a_weight_beside_the_decoder(tmp_path: Path) -> None:
    model = ModelConfig(path=str(save_tiny("llama", tmp_path / "base")))
    built = build_model(model, FullMethod(name="full"), "float32", 0)
    built.beside = torch.nn.Linear(2, 2)
    assert [id(p) for p in unreached(built, CPU, "float32")] == [
        id(p) for p in built.beside.parameters()
    ]
