"""Adapters of every family fold into plain models; `fold` itself proves that they compute alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.schema import ModelConfig
from raytune_ft.merge.fold import fold
from raytune_ft.model.export import Exporter
from raytune_ft.model.load import build_model
from raytune_ft.model.methods import trained_parameters
from tests.support.models import FAMILIES, VOCABULARY, save_tiny


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_fold(tmp_path: Path, family: str) -> None:
    model = ModelConfig(path=str(save_tiny(family, tmp_path / "base")))
    adapted = build_model(model, LoraMethod(rank=4), "float32", 0)
    weights = trained_parameters(adapted)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in weights.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    (tmp_path / "adapter").mkdir()
    exporter = Exporter(adapted, torch.float32)
    exporter.save(lambda name: weights[name].detach(), tmp_path / "adapter", 0, 1)
    tokens = torch.arange(24) % VOCABULARY
    check = fold(model, tmp_path / "adapter", tmp_path / "folded", [tokens])
    assert check.fold_difference <= check.tolerance
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    with torch.no_grad():
        expected = adapted(input_ids=tokens[None], use_cache=False).logits
        found = folded(input_ids=tokens[None], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=check.tolerance)
