"""Bases as they are published: several dtypes, and files of other parts than the language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import ModelConfig
from raytune_ft.merge.fold import fold
from raytune_ft.merge.merge import merge
from raytune_ft.promote.candidates import write_base
from tests.support.models import VOCABULARY, save_tiny_llama
from tests.support.runs import make_config, run, write_rows
from tests.unit.merge.test_fold_variants import LINEAR, TOKENS, adapt

SHORT = {"train.max_examples": 14, "train.precision": "bfloat16"}


def mixed(base: Path) -> dict[str, Tensor]:
    """Weights in bfloat16 and norms in float32; what the files then hold."""
    save_tiny_llama(base)
    weights = {
        name: weight if "norm" in name else weight.bfloat16()
        for name, weight in load_file(base / "model.safetensors").items()
    }
    weights["model.norm.weight"] += 1e-4  # no number of bfloat16
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return weights


def check(before: dict[str, Tensor], directory: Path, *touched: str) -> None:
    """All dtypes are the base's, and exactly what is named has other values."""
    after = load_file(directory / "model.safetensors")
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    assert {n: w.dtype for n, w in after.items()} == {n: w.dtype for n, w in before.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if any(part in n for part in touched)}


def test_untouched_tensors_keep_their_bytes(tmp_path: Path) -> None:
    before = mixed(tmp_path / "base")
    model = ModelConfig(path=str(tmp_path / "base"))
    adapter = adapt(tmp_path / "base", tmp_path / "adapter", target_modules=LINEAR)
    fold(model, adapter, tmp_path / "folded", TOKENS)
    check(before, tmp_path / "folded", *LINEAR)
    merge(model, [adapter, adapter], tmp_path / "merged", "uniform_soup", TOKENS)
    check(before, tmp_path / "merged", *LINEAR)
    write_base(model, tmp_path / "copy")
    check(before, tmp_path / "copy")


@pytest.mark.parametrize("method", ["freeze", "full"])
def test_checkpoints_of_whole_models_have_the_dtypes_of_their_base(
    tmp_path: Path, method: str
) -> None:
    before = mixed(tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl", 30)
    own = {"name": method} | (
        {"train": ["layers.1.mlp"], "last": 0, "head": False} if method == "freeze" else {}
    )
    config = make_config(tmp_path / "base", data, {**SHORT, "method": own})
    result = run(config, tmp_path / "run")
    assert result.status == "completed", result.error
    last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    if method == "full":
        after = load_file(last / "model.safetensors")
        assert {n: w.dtype for n, w in after.items()} == {n: w.dtype for n, w in before.items()}
    else:
        check(before, last, "layers.1.mlp")


def test_towers_and_processors_of_a_vision_language_base_are_kept(tmp_path: Path) -> None:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    sizes = {"text_config": text, "vision_config": vision}
    config = transformers.Gemma3Config(**sizes, mm_tokens_per_image=4)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    kept = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
    for name in kept:
        (base / name).write_text(f'{{"of": "{name}"}}')
    adapter = adapt(base, tmp_path / "adapter", target_modules=r".*language_model.*q_proj")
    fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", TOKENS)
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "out"))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert before.keys() - same == {n for n in before if "language_model" in n and "q_proj" in n}
