"""Blocks are found in the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config

from raytune_ft.config.methods import LoraMethod
from raytune_ft.model.blocks import find_blocks
from raytune_ft.model.methods.lora import apply_lora
from tests.support.models import FAMILIES

BLOCKS = {"gpt2": "transformer.h", "bert": "bert.encoder.layer"}


def _model(family: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(FAMILIES[family]())


def _expected(family: str) -> list[str]:
    prefix = BLOCKS.get(family, "model.layers")
    return [f"{prefix}.0", f"{prefix}.1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    assert list(find_blocks(_model(family))) == _expected(family)


@pytest.mark.parametrize("named", [None, set(), {"Embedding"}, {"MixtralExperts"}, {"Nothing"}])
@pytest.mark.parametrize("family", ["llama", "mixtral", "bert"])
def test_a_model_that_names_none_or_others(family: str, named: set[str] | None) -> None:
    model = _model(family)
    for module in model.modules():
        if hasattr(module, "_no_split_modules"):
            module._no_split_modules = named
    assert list(find_blocks(model)) == _expected(family)


def test_inside_an_adapter() -> None:
    model = apply_lora(_model("llama"), LoraMethod())
    assert list(find_blocks(model)) == [f"base_model.model.{n}" for n in _expected("llama")]


def test_towers_are_found_beside_the_decoder() -> None:
    text = FAMILIES["gemma3"]().to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        found = list(find_blocks(AutoModelForCausalLM.from_config(config)))
    assert [name.rsplit(".", 2)[-2:] for name in found] == [["layers", "0"], ["layers", "1"]] * 2


def test_a_module_without_repetition() -> None:
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == {}
