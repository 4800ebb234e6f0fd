"""Attention example by example, against torch's over each of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, PreTrainedModel

from raytune_ft.data.batch import collate
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.attention import (
    BLOCK,
    CausalBlocks,
    Examples,
    attend_by_example,
    attention,
)
from tests.support.models import VOCABULARY, save_tiny
from tests.support.runs import make_config, make_inputs, run

LENGTHS = (3, 70, 33, 1, 40, 12)
ROWS = ((0, 1), (2, 3, 4), (5,))


@pytest.mark.parametrize("length", [1, 2, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_blocks_are_causal_attention(length: int) -> None:
    torch.manual_seed(0)
    heads = [torch.randn(5, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*heads, is_causal=True, scale=0.3)
    weights = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * weights).sum(), heads)
    found: Tensor = CausalBlocks.apply(heads[0] * 0.3, *heads[1:])
    ours = torch.autograd.grad((found * weights).sum(), heads)
    torch.testing.assert_close((found, *ours), (expected, *theirs), rtol=0, atol=1e-13)


@pytest.mark.parametrize("autocast", [True, False])
def test_blocks_leave_mixed_precision_to_torch(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast rounds what torch's kernel is given, and keys may be wider than values."""
    calls: list[Any] = []
    kernel = F.scaled_dot_product_attention

    def counted(*heads: Tensor, **options: Any) -> Tensor:
        calls.append(heads)
        return kernel(*(head.float() for head in heads), **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    examples = Examples((), None, torch.zeros(1, 5, dtype=torch.long))
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    module = torch.nn.Module()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mixed = value if autocast else value.bfloat16()
        attention(module, query, key, mixed, None, examples=examples)
    assert len(calls) == 1
    attention(module, query, key, value, None, examples=examples)
    assert len(calls) == 1


def _split() -> TokenizedSplit:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCABULARY, length).astype(np.int32) for length in LENGTHS]
    return TokenizedSplit.from_examples([(ids, np.ones(len(ids), bool)) for ids in rows])


def _gradients(model: PreTrainedModel, split: TokenizedSplit, layout: Any) -> list[Tensor]:
    """Of all weights."""
    batch = collate(split, range(len(split)), layout, 0, torch.device("cpu"))
    inputs: dict[str, Any] = batch.model_inputs()
    if model.config._attn_implementation != "sdpa":
        inputs["attention_mask"] = torch.ones_like(batch.tokens_BS)
        inputs["examples"] = Examples.of(batch)
    logits = model(**inputs).logits
    keep_BS = batch.targets_BS >= 0
    loss = F.cross_entropy(logits[keep_BS], batch.targets_BS[keep_BS], reduction="sum")
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def _model(family: str, directory: Path) -> PreTrainedModel:
    if family == "mistral, window 4":
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config: Any = MistralConfig(
            vocab_size=VOCABULARY,
            intermediate_size=48,
            num_key_value_heads=2,
            sliding_window=4,
            **shape,
        )
    else:
        config = AutoConfig.from_pretrained(save_tiny(family, directory))
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mistral, window 4"])
def test_packed_rows_have_the_gradient_of_examples_alone(tmp_path: Path, family: str) -> None:
    """Norms in float32 stand in the way of 1e-9 here; a leak would be in the first digits."""
    model, split = _model(family, tmp_path), _split()
    assert model.config._attn_implementation == "sdpa"
    alone = [_gradients(model, split, ((index,),)) for index in range(len(split))]
    expected = [torch.stack(parts).sum(0) for parts in zip(*alone, strict=True)]
    assert attend_by_example(model, True)
    for layout in (ROWS, tuple((index,) for index in range(len(split)))):
        found = _gradients(model, split, layout)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sick", range(len(LENGTHS)))
def test_nan_stays_in_its_example(sick: int) -> None:
    """Also on the way back, and in the padding of other rows."""
    split = _split()
    batch = collate(split, range(len(split)), ROWS, 0, torch.device("cpu"))
    owners_BS = batch.owners_BS()
    examples = Examples.of(batch)
    heads = [torch.randn(*owners_BS.shape, 4, 8).transpose(1, 2) for _ in range(3)]
    for tensor in heads:
        tensor.transpose(1, 2)[owners_BS == sick] = torch.nan
        tensor.requires_grad_()
    out, _ = attention(torch.nn.Module(), heads[0], heads[1], heads[2], None, examples=examples)
    gradients = torch.autograd.grad((out * (owners_BS >= 0)[..., None, None]).sum(), heads)
    for found in (out, *(gradient.transpose(1, 2) for gradient in gradients)):
        assert found[owners_BS != sick].isfinite().all()
        assert found[owners_BS == sick].isnan().any()


def test_what_the_model_came_with_is_kept(tmp_path: Path) -> None:
    """Where it was asked for, where a router counts padding, and in what is saved."""
    directory = save_tiny("llama", tmp_path / "eager")
    eager = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    assert not attend_by_example(eager, True)
    mixtral = AutoModelForCausalLM.from_pretrained(
        save_tiny("mixtral", tmp_path / "mixtral"), output_router_logits=True
    )
    assert not attend_by_example(mixtral, True)

    inputs = make_inputs(tmp_path)
    config = make_config(*inputs, {"method": {"name": "full"}, "train.max_examples": 16})
    run(config, tmp_path / "run")
    (saved,) = (tmp_path / "run/checkpoints").glob("step-*/config.json")
    assert "by_example" not in saved.read_text()


@pytest.mark.parametrize("added", [True, False])
def test_a_mask_of_the_model_is_kept(added: bool) -> None:
    """It may be one of booleans, or numbers that are added to the scores."""
    torch.manual_seed(0)
    heads = [torch.randn(1, 2, 6, 8) for _ in range(3)]
    owners_BS = torch.tensor([[0, 0, 0, 1, 1, 1]])
    examples = Examples((), torch.arange(6)[None], owners_BS)
    window_SS = torch.ones(6, 6).tril().bool() & ~torch.ones(6, 6).tril(-2).bool()
    own: Tensor = torch.zeros(6, 6).masked_fill(~window_SS, -torch.inf) if added else window_SS
    module = torch.nn.Module()
    found, _ = attention(module, *heads, own.view(1, 1, 6, 6), examples=examples)
    for start in (0, 3):
        alone = [tensor[:, :, start : start + 3] for tensor in heads]
        expected = F.scaled_dot_product_attention(*alone, attn_mask=window_SS[:3, :3])
        torch.testing.assert_close(found[:, start : start + 3], expected.transpose(1, 2))
