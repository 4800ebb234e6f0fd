"""Fused experts of a mixture: their dtype under autocast, and what adapters say of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from raytune_ft.config.methods import FullMethod, LoraMethod, MethodConfig
from raytune_ft.config.schema import ModelConfig
from raytune_ft.model.experts import expert_notes
from raytune_ft.model.load import build_model
from tests.support.models import FAMILIES, VOCABULARY, save_tiny


def _save(kind: str, directory: Path) -> ModelConfig:
    if kind == "mixtral":
        return ModelConfig(path=str(save_tiny("mixtral", directory)))
    sizes = FAMILIES["qwen3"]().to_dict()
    config = transformers.Qwen3MoeConfig(
        **{key: sizes[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")},
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return ModelConfig(path=str(directory))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_trained_experts_are_multiplied_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As with the weights of fsdp, which arrive in bfloat16; float32 runs stay as they are."""
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    whole = transformers.integrations.moe._grouped_mm

    def watched(hidden: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        seen.append((hidden.dtype, weight.dtype))
        return whole(hidden, weight, offs)

    monkeypatch.setattr(transformers.integrations.moe, "_grouped_mm", watched)
    model = build_model(_save(kind, tmp_path), FullMethod(name="full"), "bfloat16", 0)
    residuals = set[torch.dtype]()
    for block in model.get_submodule("model.layers"):
        block.register_forward_hook(lambda *call: residuals.add(call[2].dtype))
    tokens = torch.arange(3, 20).unsqueeze(0) % VOCABULARY
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens).logits.float().square().mean()
    assert {weight for _, weight in seen} == {torch.bfloat16}
    loss.backward()
    experts = {name: p for name, p in model.named_parameters() if p.ndim == 3}
    assert len(experts) == 4
    assert all(p.dtype == torch.float32 for p in experts.values())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in experts.values())

    gathered = build_model(_save(kind, tmp_path), FullMethod(name="full"), "bfloat16", 0)
    for parameter in gathered.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, theirs = (each(input_ids=tokens).logits.float() for each in (model, gathered))
    assert (ours - theirs).abs().max() < 0.05 * theirs.std()

    assert residuals == {torch.bfloat16}

    seen.clear()
    build_model(_save(kind, tmp_path), FullMethod(name="full"), "float32", 0)(input_ids=tokens)
    assert {weight for _, weight in seen} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "method", "said"),
    [
        ("mixtral", LoraMethod(rank=2), True),
        ("mixtral", FullMethod(name="full"), False),
        ("llama", LoraMethod(rank=2), False),
    ],
)
def test_experts_without_an_adapter_are_named(
    tmp_path: Path, kind: str, method: MethodConfig, said: bool
) -> None:
    path = save_tiny(kind, tmp_path)
    notes = expert_notes(build_model(ModelConfig(path=str(path)), method, "float32", 0))
    assert [note.partition("(")[0] for note in notes] == ["no adapter reaches the experts "] * said
