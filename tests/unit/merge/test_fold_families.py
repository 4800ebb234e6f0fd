"""Adapters of every family fold into plain models, which compute what PEFT's own merge computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.schema import ModelConfig
from raytune_ft.merge.fold import fold
from raytune_ft.model.export import Exporter
from raytune_ft.model.load import build_model
from raytune_ft.model.methods import trained_parameters
from raytune_ft.model.probe import unreached
from tests.support.families import save_tiny_family
from tests.support.models import FAMILIES, VOCABULARY, save_tiny

# Layers that use a weight without calling the layer that holds it, or hold weights of their own.
RECURRENT = (
    "bailing_hybrid",
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "mamba",
    "mamba2",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_text",
    "qwen3_next",
    "recurrent_gemma",
    "xlstm",
    "zamba2",
)
TOKENS = torch.arange(24) % VOCABULARY


def logits(path: Path, adapter: Path | None = None) -> Tensor:
    """With an adapter those of PEFT's merge, but of Zamba, several of whose layers share a weight:
    to that one PEFT adds the deltas of all of them.
    """
    model = AutoModelForCausalLM.from_pretrained(path)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
        if not model.config.model_type.startswith("zamba"):
            model = model.merge_and_unload()
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=TOKENS[None], use_cache=False).logits
    return found


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT])
def test_fold(tmp_path: Path, family: str) -> None:
    save = save_tiny if family in FAMILIES else save_tiny_family
    model = ModelConfig(path=str(save(family, tmp_path / "base")))
    adapted = build_model(model, LoraMethod(rank=4), "float32", 0)
    weights = trained_parameters(adapted)
    torch.manual_seed(1)
    # Mamba takes the weight of its dt_proj without calling it, and so past its adapter.
    unused = {id(parameter) for parameter in unreached(adapted, torch.device("cpu"), "float32")}
    with torch.no_grad():
        for parameter in (p for p in weights.values() if id(p) not in unused):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    (tmp_path / "adapter").mkdir()
    exporter = Exporter(adapted, torch.float32)
    exporter.save(lambda name: weights[name].detach(), tmp_path / "adapter", 0, 1)
    check = fold(model, tmp_path / "adapter", tmp_path / "folded", [TOKENS])
    assert check.fold_difference <= check.tolerance
    found, expected = logits(tmp_path / "folded"), logits(tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(found, expected, rtol=0, atol=check.tolerance)
    assert (found - logits(tmp_path / "base")).abs().max() > 0.01
