"""Folding real adapters into real (tiny) models, against PEFT and against the formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import CheckpointError, MergeError, ModelError
from raytune_ft.merge import fold as fold_module
from raytune_ft.merge.fold import fold
from raytune_ft.merge.folded_weights import Adapted
from raytune_ft.merge.verify import ABSOLUTE_TOLERANCE
from raytune_ft.model.load import disk_dtype

VOCABULARY = 61
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 16, "use_dora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 16,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 64},
    },
    "rank-stabilised dora": {"r": 2, "lora_alpha": 8, "use_rslora": True, "use_dora": True},
}


def tiny_llama(
    directory: Path, dtype: torch.dtype = torch.float32, tied: bool = False, seed: int = 0
) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    return directory


def random_adapter(base: Path, directory: Path, **lora: Any) -> Path:
    """An adapter none of whose parts is zero, DoRA's magnitudes included."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear", **lora})
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


@pytest.fixture
def examples() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randint(0, VOCABULARY, (length,)) for length in (3, 17, 40)]


def logits(model: nn.Module, examples: list[Tensor]) -> Tensor:
    with torch.no_grad():
        rows: list[Tensor] = [model.eval()(ids[None]).logits[0] for ids in examples]
    return torch.cat(rows)


def through_peft(base: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_plain_transformers_gives_the_logits_of_base_and_adapter(
    tmp_path: Path, examples: list[Tensor], kind: str
) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    check = fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)
    promoted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    combined = through_peft(base, adapter)
    found, expected = logits(promoted, examples), logits(combined, examples)
    difference = (found - expected).abs().max().item()
    assert difference <= 1e-4
    assert difference == pytest.approx(check.written_difference, abs=1e-5)
    assert (check.tokens, check.dtype, check.tolerance) == (60, "float32", 1e-4)
    # The adapter matters: without it the logits are far away.
    untouched = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(untouched, examples) - expected).abs().max() > 0.5
    merged = combined.merge_and_unload()
    assert (logits(merged, examples) - found).abs().max() <= 1e-4


def delta(adapter: Path, module: str, scale: float) -> Tensor:
    weights = load_file(adapter / "adapter_model.safetensors")
    prefix = f"base_model.model.{module}"
    b_out_r: Tensor = weights[f"{prefix}.lora_B.weight"].double()
    a_r_in: Tensor = weights[f"{prefix}.lora_A.weight"].double()
    return scale * (b_out_r @ a_r_in)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "scale"), [("lora", 4.0), ("rslora", 4.0)])
def test_the_weights_are_the_formula_rounded_once(
    tmp_path: Path, examples: list[Tensor], dtype: torch.dtype, kind: str, scale: float
) -> None:
    base = tiny_llama(tmp_path / "base", dtype)
    adapter = random_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    model = ModelConfig(path=str(base))
    assert disk_dtype(model) == dtype
    check = fold(model, adapter, tmp_path / "out", examples)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "out"))
    assert before.keys() == after.keys()
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] in str(dtype)
    touched = 0
    for name, weight in after.items():
        assert weight.dtype == dtype
        if "proj" not in name:
            assert torch.equal(weight, before[name])
            continue
        touched += 1
        exact = before[name].double() + delta(adapter, name.removesuffix(".weight"), scale)
        spacing = torch.finfo(dtype).eps * exact.abs()
        # Half a unit in the last place of `dtype`, and a little for float32's sums.
        assert ((weight.double() - exact).abs() <= 0.5 * spacing + 1e-6).all(), name
    assert touched == 14
    assert check.fold_difference <= 1e-4
    assert (check.rounding_tolerance is None) == (dtype == torch.float32)
    assert check.rounding <= (1e-5 if dtype == torch.float32 else 0.02)


def test_the_dora_weights_are_the_formula(tmp_path: Path, examples: list[Tensor]) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", **ADAPTERS["dora"])
    fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "out"))
    name = "model.layers.1.mlp.down_proj"
    moved = before[f"{name}.weight"].double() + delta(adapter, name, 4.0)
    magnitude = load_file(adapter / "adapter_model.safetensors")[
        f"base_model.model.{name}.lora_magnitude_vector"
    ].double()
    expected = moved * (magnitude / moved.norm(dim=1))[:, None]
    assert (after[f"{name}.weight"].double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "q_proj"]])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_a_tied_head_is_not_lost(
    tmp_path: Path, examples: list[Tensor], targets: list[str]
) -> None:
    base = tiny_llama(tmp_path / "base", tied=True)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    adapter = random_adapter(base, tmp_path / "adapter", r=4, lora_alpha=16, target_modules=targets)
    fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)
    promoted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits(through_peft(base, adapter), examples)
    assert (logits(promoted, examples) - expected).abs().max() <= 1e-4
    untouched = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(untouched, examples) - expected).abs().max() > 0.1
    assert not promoted.config.tie_word_embeddings


def test_a_tied_model_whose_head_is_not_adapted_stays_tied(
    tmp_path: Path, examples: list[Tensor]
) -> None:
    base = tiny_llama(tmp_path / "base", tied=True)
    adapter = random_adapter(base, tmp_path / "adapter", **ADAPTERS["lora"])
    fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings


def test_transposed_layers_of_gpt2(tmp_path: Path, examples: list[Tensor]) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    adapter = random_adapter(
        tmp_path / "base",
        tmp_path / "adapter",
        r=4,
        lora_alpha=16,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
    )
    model = ModelConfig(path=str(tmp_path / "base"))
    check = fold(model, adapter, tmp_path / "out", examples)
    assert check.written_difference <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_fine_tune_is_written_in_the_dtype_of_its_base(
    tmp_path: Path, examples: list[Tensor], dtype: torch.dtype
) -> None:
    base = tiny_llama(tmp_path / "base", dtype)
    trained = tiny_llama(tmp_path / "trained", torch.float32, seed=5)
    check = fold(ModelConfig(path=str(base)), trained, tmp_path / "out", examples)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("trained", "out"))
    assert all(torch.equal(after[name], before[name].to(dtype)) for name in before)
    assert check.fold_difference == 0


def test_a_real_pretrained_model(tmp_path: Path, shared_dir: Path) -> None:
    base = shared_dir / "models" / "stories260k"
    adapter = random_adapter(base, tmp_path / "adapter", r=8, lora_alpha=16)
    examples = [torch.arange(3, 300), torch.arange(100, 140)]
    check = fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)
    promoted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits(through_peft(base, adapter), examples)
    assert (logits(promoted, examples) - expected).abs().max() <= 1e-4
    assert check.written_difference <= check.tolerance


def test_a_wrong_fold_is_refused(
    tmp_path: Path, examples: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", **ADAPTERS["lora"])
    right = Adapted._add

    def slightly_wrong(self: Adapted, target: str, base: Tensor, delta: Any, start: int) -> Tensor:
        moved = right(self, target, base, delta, start)
        if target == "model.layers.0.mlp.down_proj.weight":
            moved[3, 4] += 0.01
        return moved

    monkeypatch.setattr(Adapted, "_add", slightly_wrong)
    with pytest.raises(MergeError, match="differ from base \\+ adapter by"):
        fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)


def test_a_wrong_file_is_refused(
    tmp_path: Path, examples: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", **ADAPTERS["lora"])
    right = fold_module.check_written

    def after_damage(*arguments: Any) -> Any:
        check = right(*arguments)
        weights = load_file(tmp_path / "out/model.safetensors")
        weights["model.norm.weight"][0] += 1e-6
        save_file(weights, tmp_path / "out/model.safetensors", {"format": "pt"})
        return check

    monkeypatch.setattr(fold_module, "check_written", after_damage)
    with pytest.raises(MergeError, match=r"out/model\.safetensors does not hold the bytes"):
        fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)
    assert not (tmp_path / "out/manifest.json").exists()


def test_an_adapter_with_nan_is_refused(tmp_path: Path, examples: list[Tensor]) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", **ADAPTERS["lora"])
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(MergeError, match=r"down_proj\.weight is not finite"):
        fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)


def test_what_float16_cannot_hold_is_refused(tmp_path: Path, examples: list[Tensor]) -> None:
    base = tiny_llama(tmp_path / "base", torch.float16)
    adapter = random_adapter(base, tmp_path / "adapter", r=4, lora_alpha=4e9)
    with pytest.raises(MergeError, match=r"not finite .* in torch\.float16"):
        fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, examples: list[Tensor]) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", **ADAPTERS["lora"])
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    dropped = [name for name in weights if "layers.1" not in name]
    save_file({name: weights[name] for name in dropped}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="adapter of another model: 14 weights differ"):
        fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)
    wider = {name: torch.cat([weight, weight]) for name, weight in weights.items()}
    save_file(wider, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="is not an adapter of"):
        fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)


def test_pickles_are_never_loaded(tmp_path: Path, examples: list[Tensor]) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", **ADAPTERS["lora"])
    pickled = adapter / "adapter_model.safetensors"
    torch.save(load_file(pickled), adapter / "adapter_model.bin")
    pickled.unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)
    save_file(torch.load(adapter / "adapter_model.bin"), pickled, {"format": "pt"})
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", examples)


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised"):
        disk_dtype(ModelConfig(path=str(base)))
    adapter = random_adapter(tiny_llama(tmp_path / "whole"), tmp_path / "adapter", r=2)
    with pytest.raises(ModelError, match=r"nothing can be folded; write promote\.base"):
        fold(ModelConfig(path=str(base)), adapter, tmp_path / "out", [torch.arange(5)])


def test_the_dtype_of_a_config_without_one_is_that_of_the_weights(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config))
    assert disk_dtype(ModelConfig(path=str(base))) == torch.bfloat16
    assert ABSOLUTE_TOLERANCE == 1e-4
