"""Trained weights that text does not reach: the vision tower of a multimodal model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config

from raytune_ft.config.schema import Config
from tests.support.distributed import run_distributed
from tests.support.models import FAMILIES, save_character_tokenizer
from tests.support.runs import final_weights, largest_difference, make_config, run, write_rows

METHODS = ("lora", "full")


def _save_multimodal(directory: Path) -> Path:
    text = FAMILIES["gemma3"]().to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    save_character_tokenizer(directory)
    return directory


def _config(root: Path, method: str) -> Config:
    changes = {"method": {"name": method}, "train.max_examples": 35, "train.adam_epsilon": 1e-6}
    return make_config(root / "model", root / "rows.jsonl", changes)


def _run_all(root: Path, layout: str, strategy: str) -> None:
    for method in METHODS:
        assert run(_config(root, method), root / f"{layout}-{method}", strategy).error is None


@pytest.mark.distributed
def test_a_tower_stays_as_it_was(tmp_path: Path) -> None:
    _save_multimodal(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 60)
    _run_all(tmp_path, "single", "single")
    for strategy in ("ddp", "fsdp"):
        run_distributed(_run_all, 2, tmp_path, strategy, strategy)
        for method in METHODS:
            one, other = tmp_path / f"single-{method}", tmp_path / f"{strategy}-{method}"
            assert max(largest_difference(one, other)) < 1e-5
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    after = final_weights(tmp_path / "ddp-full")
    tower = [name for name in after if "vision_tower" in name]
    assert tower
    assert all(torch.equal(after[name], before[name]) for name in tower)
