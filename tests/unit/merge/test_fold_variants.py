"""Everything that PEFT calls LoRA, folded tensor by tensor, against PEFT's own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import CheckpointError, ModelError
from raytune_ft.merge import streaming_forward as weights_module
from raytune_ft.merge.fold import fold
from tests.support.models import VOCABULARY, save_tiny, save_tiny_llama

# PEFT says what it does for tied and transposed layers.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

LINEAR = ["q_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding, dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head, dora, rslora": {
        "target_modules": ["lm_head", "k_proj"],
        "use_dora": True,
        "use_rslora": True,
    },
    "saved head": {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
    "saved embedding and head": {
        "target_modules": LINEAR,
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "saved norms": {"target_modules": LINEAR, "modules_to_save": ["input_layernorm"]},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"layers.1.*q_proj": 7},
        "alpha_pattern": {"down_proj": 3},
        "use_rslora": True,
    },
    "parameter": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}
TOKENS = [torch.arange(5, 29), torch.arange(40, 50)]


def adapt(base: Path, directory: Path, **lora: Any) -> Path:
    """A LoRA adapter, see `adapt_by`."""
    return adapt_by(LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **lora}), base, directory)


def adapt_by(config: PeftConfig, base: Path, directory: Path) -> Path:
    """Every number of the adapter is moved from where it began."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(str(directory))
    return directory


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    combined = PeftModel.from_pretrained(model, adapter)
    head = model.get_output_embeddings()
    adapted = any(
        "lora_" in n for m in (head, model.get_input_embeddings()) for n, _ in m.named_children()
    )
    if adapted:  # PEFT would add one delta to both of them, or both deltas to one
        plain = getattr(head, "base_layer", head)
        plain.weight = nn.Parameter(plain.weight.detach().clone())
    state: dict[str, Tensor] = combined.merge_and_unload().state_dict()
    return state


def loaded(directory: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    return state


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=2e-6, msg=name)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, so that their borders matter."""
    monkeypatch.setattr(weights_module, "CHUNK", 250)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_is_what_peft_merges(tmp_path: Path, kind: str, tied: bool) -> None:
    base = save_tiny_llama(tmp_path / "base", tied=tied)
    adapter = adapt(base, tmp_path / "adapter", **KINDS[kind])
    check = fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", TOKENS, "10KB")
    require_equal(loaded(tmp_path / "out"), merged_by_peft(base, adapter))
    assert check.written_difference <= check.tolerance
    assert 0 <= check.kl < 1e-6
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    sizes = {f: (tmp_path / "out" / f).stat().st_size for f in index["weight_map"].values()}
    assert len(sizes) > 4
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert {f["path"]: f["bytes"] for f in manifest["files"]}.items() >= sizes.items()
    assert manifest["check"]["kl"] == check.kl
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("dora", [False, True])
def test_transposed_weights_with_biases(tmp_path: Path, dora: bool) -> None:
    base = save_tiny("gpt2", tmp_path / "base")
    targets = ["c_attn", "c_proj", "wte"]
    bias = {} if dora else {"lora_bias": True, "target_modules": targets[:2]}
    lora = {"target_modules": targets, "use_dora": dora, "fan_in_fan_out": True, **bias}
    adapter = adapt(base, tmp_path / "adapter", **lora)
    fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", TOKENS)
    require_equal(loaded(tmp_path / "out"), merged_by_peft(base, adapter))


def test_biases_that_were_trained(tmp_path: Path) -> None:
    base = save_tiny("gpt2", tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", target_modules=["c_attn"], bias="all")
    fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", TOKENS)
    require_equal(loaded(tmp_path / "out"), merged_by_peft(base, adapter))


def test_a_base_in_shards_and_another_dtype(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    adapter = adapt(tmp_path / "base", tmp_path / "adapter", target_modules="all-linear")
    settings = ModelConfig(path=str(tmp_path / "base"))
    check = fold(settings, adapter, tmp_path / "out", TOKENS, dtype=torch.bfloat16)
    expected = merged_by_peft(base, adapter)
    found = loaded(tmp_path / "out")
    assert check.dtype == "bfloat16"
    for name, weight in expected.items():
        difference = (found[name].double() - weight.double()).abs()
        assert (difference <= 2.0**-8 * weight.abs().double() + 1e-5).all(), name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa of .* changed the base"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices of .* cannot be folded"),
        ({"peft_type": "LOHA"}, "peft_type=LOHA of .* has no delta"),
    ],
)
def test_what_has_no_delta_is_refused(tmp_path: Path, changed: Any, message: str) -> None:
    base = save_tiny_llama(tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", target_modules=LINEAR)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ModelError, match=message):
        fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", TOKENS)
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_of_the_base_is_named(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    adapter = adapt(tmp_path / "base", tmp_path / "adapter", target_modules=LINEAR)
    gone = sorted((tmp_path / "base").glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=rf"lacks {gone.name}"):
        fold(ModelConfig(path=str(tmp_path / "base")), adapter, tmp_path / "out", TOKENS)
    gone.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelError, match=rf"{gone.name} is damaged"):
        fold(ModelConfig(path=str(tmp_path / "base")), adapter, tmp_path / "out", TOKENS)


@pytest.mark.parametrize("model_type", ["llama", "vit"])
def test_code_beside_a_model_is_not_run(tmp_path: Path, model_type: str) -> None:
    """Transformers has a causal language model of the type `llama`, and none of the type `vit`."""
    base = save_tiny_llama(tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", target_modules=LINEAR)
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
    }
    config["model_type"] = model_type
    (base / "config.json").write_text(json.dumps(config))
    (base / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    model = ModelConfig(path=str(base))
    if model_type == "llama":
        fold(model, adapter, tmp_path / "out", TOKENS)
        assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    else:
        with pytest.raises(ModelError, match=r"Python code of its own.*trust_remote_code: true"):
            fold(model, adapter, tmp_path / "out", TOKENS)
    assert not (tmp_path / "ran").exists()


def test_a_base_with_nan_is_refused(tmp_path: Path) -> None:
    from raytune_ft.errors import MergeError

    base = save_tiny_llama(tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", target_modules=LINEAR)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=r"model\.norm\.weight is not finite"):
        fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", TOKENS)


def test_an_adapter_that_names_unknown_modules_is_refused(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    other = save_tiny("gpt2", tmp_path / "other")
    adapter = adapt(other, tmp_path / "adapter", target_modules=["c_attn"])
    with pytest.raises(CheckpointError, match="is not an adapter of its base"):
        fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", TOKENS)
    assert VOCABULARY == 96
