"""A model without its weights is refused where the whole one is, and is the same otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from raytune_ft.config.methods import FullMethod, LoraMethod
from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ModelError
from raytune_ft.model import meta as skeleton
from raytune_ft.model.file_weights import NotInParts
from raytune_ft.model.load import build_model, disk_dtype
from raytune_ft.model.meta import Built, build
from raytune_ft.tensors.write import Part
from tests.support.models import save_tiny_llama

FULL = FullMethod(name="full")
LORA = LoraMethod(rank=2)


def _built(path: Path, method: FullMethod | LoraMethod = FULL) -> Built:
    return build(ModelConfig(path=str(path)), method, "float32", 0, in_parts=True)


def _filled(built: Built) -> dict[str, Tensor]:
    """The parameters as one process would hold them."""
    assert built.weights is not None
    values = {
        name: torch.empty_like(p, device="cpu") if p.is_meta else p.detach()
        for name, p in built.model.named_parameters()
    }
    built.weights.fill({n: Part(tuple(v.shape), 0, v.view(-1)) for n, v in values.items()})
    return values


def _change(path: Path, change: dict[str, Tensor | None]) -> None:
    """Add, replace or remove (None) tensors of the model's one file."""
    tensors = {**load_file(path / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path / "model.safetensors", {"format": "pt"})


def test_nothing_is_read_but_buffers_and_new_weights(tmp_path: Path) -> None:
    path = save_tiny_llama(tmp_path / "base")
    built = _built(path, LORA)
    meta = {name for name, p in built.model.named_parameters() if p.is_meta}
    assert meta == {name for name, p in built.model.named_parameters() if not p.requires_grad}
    assert not any(buffer.is_meta for buffer in built.model.buffers())
    whole = build_model(ModelConfig(path=str(path)), LORA, "float32", 0)
    values = _filled(built)
    assert all(torch.equal(values[name], p) for name, p in whole.named_parameters())


def test_truncated_file(tmp_path: Path) -> None:
    path = save_tiny_llama(tmp_path / "base")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        _built(path)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_file(tmp_path: Path) -> None:
    path = save_tiny_llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    sorted((tmp_path / "sharded").glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        _built(tmp_path / "sharded")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_goes_before_it_is_read(tmp_path: Path) -> None:
    path = save_tiny_llama(tmp_path / "base")
    built = _built(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read") as caught:
        _filled(built)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("in_parts", [True, False])
def test_missing_and_odd_weights(tmp_path: Path, in_parts: bool) -> None:
    path = save_tiny_llama(tmp_path / "base")
    model = ModelConfig(path=str(path))
    _change(path, {"some.head.weight": torch.ones(3)})  # is left alone, as by from_pretrained
    build(model, FULL, "float32", 0, in_parts)
    _change(path, {"model.norm.weight": None})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, among them model\.norm\.weight"):
        build(model, FULL, "float32", 0, in_parts)
    _change(path, {"model.norm.weight": torch.ones(3)})
    with pytest.raises(ModelError, match="cannot be loaded"):
        build(model, FULL, "float32", 0, in_parts)


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_the_files_hold_twice(tmp_path: Path, equal: bool) -> None:
    path = save_tiny_llama(tmp_path / "base", tied=True)
    embeddings = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    _change(path, {"lm_head.weight": embeddings.clone() if equal else embeddings + 1})
    built = _built(path)
    values = _filled(built)
    whole = build_model(ModelConfig(path=str(path)), FULL, "float32", 0)
    assert ("lm_head.weight" in values) != equal
    assert list(values) == [name for name, _ in whole.named_parameters()]
    assert all(torch.equal(values[name], p) for name, p in whole.named_parameters())


def test_what_cannot_be_read_in_parts_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NotInParts("it is odd")

    path = save_tiny_llama(tmp_path / "base")
    monkeypatch.setattr(skeleton, "find_sources", refuse)
    built = _built(path)
    assert built.weights is None
    assert built.notes == ("every worker reads the whole model, because it is odd",)
    assert not any(parameter.is_meta for parameter in built.model.parameters())


def test_libraries_are_left_as_they_were(tmp_path: Path) -> None:
    to = nn.Module.to
    _built(save_tiny_llama(tmp_path / "base"), LORA)
    assert nn.Module.to is to
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base").lm_head.weight.device.type == "cpu"
    )


def test_dtype_of_files_without_one_in_the_config(tmp_path: Path) -> None:
    path = save_tiny_llama(tmp_path / "base")
    config = path / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32",', ""))
    assert disk_dtype(ModelConfig(path=str(path))) == torch.float32
