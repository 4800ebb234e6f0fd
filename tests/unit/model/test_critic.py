"""The value head reads what the head of the model reads, and nothing else notices it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytune_ft.config.methods import FullMethod, LoraMethod
from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ModelError
from raytune_ft.model.critic import VALUE_HEAD, add_critic, check_critic, critic_of, critic_weights
from raytune_ft.model.load import build_model
from raytune_ft.model.methods import trained_parameters, without_method
from raytune_ft.model.objectives.tokens import label_logits
from raytune_ft.model.probe import unreached
from tests.support.models import FAMILIES, VOCABULARY, save_tiny

TOKENS = torch.arange(24).view(2, 12) % VOCABULARY
PLACES = torch.tensor([3, 4, 11, 20])


def built(
    directory: Path, family: str = "llama", method: Any = None, detached: bool = False
) -> Any:
    """A model with a critic whose weights are drawn."""
    model: Any = build_model(
        ModelConfig(path=str(save_tiny(family, directory))), method or LoraMethod(), "float32", 0
    )
    add_critic(model, "float32", detached)
    nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(0))
    return model


def valued(model: Any) -> tuple[Tensor, Tensor]:
    """Logits and values at `PLACES`."""
    critic = critic_of(model)
    assert critic is not None
    inputs = {"input_ids": TOKENS, "use_cache": False}
    with critic.reading(PLACES):
        logits = label_logits(model, model.get_output_embeddings(), inputs, PLACES)
    return logits, critic.values_N


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_of_the_states_that_the_head_reads(tmp_path: Path, family: str) -> None:
    model = built(tmp_path, family)
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    plain_NV = label_logits(model, head, {"input_ids": TOKENS, "use_cache": False}, PLACES)
    handle = head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    logits_NV, values_N = valued(model)
    handle.remove()
    assert torch.equal(logits_NV, plain_NV)
    expected_N = model.value_head(seen[0].flatten(0, 1)[PLACES])[:, 0]
    assert torch.equal(values_N, expected_N)
    assert values_N.std() > 0


def test_nothing_else_notices_it(tmp_path: Path) -> None:
    """Passes that are not read have no values, and the base without its method is the base."""
    model = built(tmp_path)
    output = model(input_ids=TOKENS, use_cache=False)
    assert output.hidden_states is None
    plain = build_model(ModelConfig(path=str(tmp_path)), LoraMethod(), "float32", 0)
    assert torch.equal(output.logits, plain(input_ids=TOKENS, use_cache=False).logits)
    with torch.no_grad(), without_method(model), without_method(plain):
        logits = model(input_ids=TOKENS, use_cache=False).logits
        assert torch.equal(logits, plain(input_ids=TOKENS, use_cache=False).logits)


@pytest.mark.parametrize("method", [LoraMethod(), FullMethod(name="full")])
@pytest.mark.parametrize("detached", [False, True])
def test_where_the_gradient_of_values_goes(tmp_path: Path, method: Any, detached: bool) -> None:
    model = built(tmp_path, method=method, detached=detached)
    _, values_N = valued(model)
    torch.autograd.backward(values_N.square().sum())
    moved = {name for name, p in trained_parameters(model).items() if p.grad is not None}
    assert set(critic_weights(model)) == {f"{VALUE_HEAD}.weight", f"{VALUE_HEAD}.bias"}
    assert moved >= set(critic_weights(model))
    assert (moved == set(critic_weights(model))) is detached


def test_it_counts_as_reached(tmp_path: Path) -> None:
    """Else DDP would look for unused weights in each step, and ZeRO would not decay it."""
    assert unreached(built(tmp_path), torch.device("cpu"), "float32") == []


def test_values_begin_at_0_in_master_precision(tmp_path: Path) -> None:
    model: Any = build_model(
        ModelConfig(path=str(save_tiny("llama", tmp_path))), LoraMethod(), "bfloat16", 0
    )
    add_critic(model, "bfloat16", detached=False)
    with torch.autocast("cpu", torch.bfloat16):
        _, values_N = valued(model)
    assert values_N.dtype == model.value_head.weight.dtype == torch.float32
    assert not values_N.any()


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    model: Any = build_model(
        ModelConfig(path=str(save_tiny("llama", tmp_path))), FullMethod(name="full"), "float32", 0
    )
    model.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="output layer"):
        check_critic(model)


def test_a_head_that_is_not_called_is_refused(tmp_path: Path) -> None:
    model: Any = built(tmp_path)
    critic = critic_of(model)
    assert critic is not None
    with critic.reading(PLACES):
        model.get_base_model().model(input_ids=TOKENS)
    with pytest.raises(ModelError, match="output layer"):
        _ = critic.values_N
