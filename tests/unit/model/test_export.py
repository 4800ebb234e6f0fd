"""What is written is read by plain transformers and PEFT, whatever the family."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from raytune_ft.config.methods import FullMethod, LoraMethod
from raytune_ft.config.schema import ModelConfig
from raytune_ft.files import sha256_of
from raytune_ft.model.export import Exporter
from raytune_ft.model.load import build_model
from raytune_ft.model.methods import trained_parameters
from raytune_ft.records import FileRecord
from raytune_ft.tensors.read import open_shards
from tests.support.models import FAMILIES, VOCABULARY, save_tiny

TOKENS = torch.arange(24).view(2, 12) % VOCABULARY


def _trained(base: Path, method: Any) -> Any:
    """A model with every trained weight moved."""
    model = build_model(ModelConfig(path=str(base)), method, "float32", 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def _export(model: Any, directory: Path, world_size: int) -> None:
    directory.mkdir()
    exporter = Exporter(model, torch.float32)
    weights = trained_parameters(model)
    together = Barrier(world_size)

    def save(rank: int) -> list[FileRecord]:
        together.wait()
        return exporter.save(lambda name: weights[name].detach(), directory, rank, world_size)

    with ThreadPoolExecutor(world_size) as ranks:
        records = [record for found in ranks.map(save, range(world_size)) for record in found]
    assert sorted(record.path for record in records) == sorted(p.name for p in directory.iterdir())
    assert all(sha256_of(directory / record.path) == record.sha256 for record in records)


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_files_of_one_rank_and_of_three(tmp_path: Path, family: str) -> None:
    base = save_tiny(family, tmp_path / "base")
    model = _trained(base, FullMethod(name="full"))
    for world_size in (1, 3):
        directory = tmp_path / str(world_size)
        _export(model, directory, world_size)
        read, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        state = read.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name], tensor), name
        assert torch.equal(_logits(read.eval()), _logits(model))
        with (
            open_shards(directory, "model") as ours,
            open_shards(base, "model") as theirs,
        ):  # also on the disk
            assert ours.shapes == theirs.shapes


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter(tmp_path: Path, family: str) -> None:
    base = save_tiny(family, tmp_path / "base")
    model = _trained(base, LoraMethod(rank=4))
    _export(model, tmp_path / "adapter", 1)
    plain = AutoModelForCausalLM.from_pretrained(base)
    read = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(_logits(read), _logits(model), rtol=0, atol=1e-6)
