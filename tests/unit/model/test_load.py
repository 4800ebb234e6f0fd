"""What cannot be built is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_ft.config.methods import FullMethod, LoraMethod
from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ModelError
from raytune_ft.model.export import Exporter
from raytune_ft.model.load import (
    build_model,
    check_pinned,
    load_base,
    load_model_config,
    load_tokenizer,
)
from raytune_ft.model.meta import build_shapes
from raytune_ft.model.methods import trained_parameters
from tests.support.models import save_tiny_llama


def test_damaged_weights(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(ModelConfig(path=str(base)), torch.float32)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    state = AutoModelForCausalLM.from_pretrained(base).state_dict()
    (base / "model.safetensors").unlink()
    torch.save(state, base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="write a model with safetensors weights"):
        load_base(ModelConfig(path=str(base)), torch.float32)


@pytest.mark.parametrize("path", ["builtin:small", "/nowhere/model", "./nowhere"])
def test_a_model_that_is_not_there(path: str) -> None:
    with pytest.raises(ModelError, match="write"):
        load_model_config(ModelConfig(path=path))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"model_type": "llama", "hidden_size": "wide"}, "does not take"),
        ({"model_type": "mamba2", "num_heads": 3}, "does not take"),
        ({"model_type": "dbrx"}, "cannot build"),
        ({"model_type": "emu3"}, "cannot load again"),
    ],
)
def test_a_config_that_transformers_does_not_take(
    tmp_path: Path, written: dict[str, Any], words: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ModelError, match=f"{words}.*; write") as refusal:
        build_shapes(ModelConfig(path=str(tmp_path)))
    assert "\n" not in str(refusal.value)


def test_weights_that_move_are_float32_and_the_rest_is_narrow(tmp_path: Path) -> None:
    model = ModelConfig(path=str(save_tiny_llama(tmp_path / "base")))
    built = build_model(model, LoraMethod(rank=2), "bfloat16", seed=0)
    trained = trained_parameters(built)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = {p.dtype for name, p in built.named_parameters() if name not in trained}
    assert frozen == {torch.bfloat16}
    full = build_model(model, FullMethod(name="full"), "bfloat16", seed=0)
    assert {p.dtype for p in full.parameters()} == {torch.float32}


@pytest.mark.parametrize("targets", [["mlp"], ["q_prj"], ["model"]])
def test_targets_that_are_no_linear_layers(tmp_path: Path, targets: list[str]) -> None:
    model = ModelConfig(path=str(save_tiny_llama(tmp_path / "base")))
    with pytest.raises(ModelError, match=r"names no layer of this LlamaForCausalLM; write"):
        build_model(model, LoraMethod(targets=targets), "float32", 0)


def test_a_full_model_keeps_how_its_base_generates(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    settings = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6}
    (base / "generation_config.json").write_text(json.dumps(settings))
    built = build_model(ModelConfig(path=str(base)), FullMethod(name="full"), "float32", 0)
    exporter = Exporter(built, torch.float32)
    (tmp_path / "saved").mkdir()
    trained = trained_parameters(built)
    exporter.save(lambda name: trained[name].detach(), tmp_path / "saved", 0, 1)
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {key: saved[key] for key in settings} == settings


def test_new_weights_are_drawn_from_the_seed_alone(tmp_path: Path) -> None:
    model = ModelConfig(path=str(save_tiny_llama(tmp_path / "base")))

    def drawn(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        built = build_model(model, LoraMethod(rank=2), "float32", seed)
        return {name: p.detach() for name, p in trained_parameters(built).items() if "_A." in name}

    first, same, other = drawn(0, 1), drawn(0, 2), drawn(1, 1)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0a1b2c3", "A" * 40, "0" * 41])
def test_code_of_the_hub_that_may_change_is_refused(revision: str | None) -> None:
    model = ModelConfig(path="org/name", revision=revision, trust_remote_code=True)
    for read in (check_pinned, load_model_config, load_tokenizer):
        with pytest.raises(ModelError, match=r"^model\.path=org/name .*; write the 40 digits"):
            read(model)


def test_code_that_is_here_or_of_a_commit_is_not(tmp_path: Path) -> None:
    commit = "0a1b2c3d4e" * 4
    check_pinned(ModelConfig(path="org/name"))
    check_pinned(ModelConfig(path="org/name", revision=commit, trust_remote_code=True))
    base = save_tiny_llama(tmp_path / "base")
    here = ModelConfig(path=str(base), trust_remote_code=True)
    check_pinned(here)
    for file in ("config.json", "tokenizer_config.json"):
        before = (base / file).read_text()
        elsewhere = {"auto_map": {"AutoConfig": "other/name--file.Class"}}
        (base / file).write_text(json.dumps(json.loads(before) | elsewhere))
        with pytest.raises(ModelError, match="runs code of the hub at main"):
            check_pinned(here)
        check_pinned(here.model_copy(update={"revision": commit}))
        (base / file).write_text(before)
