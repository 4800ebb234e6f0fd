"""A model whose workers read their own parts is, to the bit, the one that is read whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from raytune_ft.config.methods import FullMethod, LoraMethod, MethodConfig
from raytune_ft.config.schema import ModelConfig, ParallelConfig
from raytune_ft.model.load import Precision, build_model
from raytune_ft.model.meta import build
from raytune_ft.strategy.fsdp import Fsdp
from raytune_ft.tensors.read import TensorFiles
from tests.support.distributed import run_distributed
from tests.support.models import save_tiny

METHODS: dict[str, MethodConfig] = {
    "full": FullMethod(name="full"),
    "lora": LoraMethod(rank=3),
    "rslora": LoraMethod(rank=3, rslora=True),
    "dora": LoraMethod(rank=3, dora=True),
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"vocab_size": 97}),  # rows that no number of workers divides
    "tied": ("llama", {"tie_word_embeddings": True, "vocab_size": 97}),
    "gpt2": ("gpt2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 5}),
    "gemma3": ("gemma3", {}),
}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _compare(whole: nn.Module, laid_out: nn.Module) -> None:
    parameters, expected = dict(laid_out.named_parameters()), dict(whole.named_parameters())
    assert list(parameters) == list(expected)
    for name, parameter in parameters.items():
        value, other = _whole(parameter.detach()), expected[name]
        assert parameter.requires_grad == other.requires_grad, name
        assert value.dtype == other.dtype, name
        assert torch.equal(value, other.detach()), name
    buffers = dict(laid_out.named_buffers())
    assert list(buffers) == [name for name, _ in whole.named_buffers()]
    for name, buffer in whole.named_buffers():
        assert buffers[name].dtype == buffer.dtype, name
        assert torch.equal(buffers[name], buffer), name


def _load(path: Path, method: MethodConfig, precision: Precision, offload: str = "none") -> Any:
    """The model laid out and filled, and how many elements were read of each tensor."""
    read: dict[str, int] = {}
    elements = TensorFiles.elements

    def counting(files: TensorFiles, name: str, start: int, end: int) -> torch.Tensor:
        read[name] = read.get(name, 0) + end - start
        return elements(files, name, start, end)

    strategy = Fsdp(ParallelConfig.model_validate({"offload": offload}), precision)
    built = build(ModelConfig(path=str(path)), method, precision, 3, in_parts=True)
    assert not built.notes, built.notes
    assert built.weights is not None
    model = strategy.lay_out(built.model)
    with mock.patch.object(TensorFiles, "elements", counting):
        parts = {name: strategy.part(name, p.detach()) for name, p in model.named_parameters()}
        built.weights.fill(parts)
    return model, read, parts


def _all_equal(root: Path) -> None:
    for path in sorted(root.iterdir()):
        for name, method in METHODS.items():
            if name == "dora" and path.name.startswith("mixtral"):
                continue  # PEFT has none for fused experts
            for precision in ("float32", "bfloat16") if name in ("full", "lora") else ("float32",):
                model = ModelConfig(path=str(path))
                whole = build_model(model, method, precision, 3)
                laid_out, read, parts = _load(path, method, precision)
                _compare(whole, laid_out)
                if not path.name.startswith("mixtral"):  # whose experts are converted whole
                    held = sum(p.values.numel() for n, p in parts.items() if "lora_" not in n)
                    assert sum(read.values()) == held
    for method in (METHODS["full"], METHODS["lora"]):
        laid_out, _, _ = _load(root / "llama", method, "float32", "all")
        assert {p.device.type for p in laid_out.parameters()} == {"cpu"}
        _compare(build_model(ModelConfig(path=str(root / "llama")), method, "float32", 3), laid_out)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_equal_to_the_bit(tmp_path: Path, world_size: int) -> None:
    for name, (family, changes) in FAMILIES.items():
        save_tiny(family, tmp_path / name, **changes)
    for name in ("llama", "mixtral"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / f"{name}-sharded", max_shard_size="20KB")
        assert len(list((tmp_path / f"{name}-sharded").glob("*.safetensors"))) > 1
    run_distributed(_all_equal, world_size, tmp_path)
