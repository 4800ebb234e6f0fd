"""Activation checkpointing changes memory and nothing else."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytune_ft.config.methods import FullMethod
from raytune_ft.config.schema import ModelConfig
from raytune_ft.model import checkpointing
from raytune_ft.model.checkpointing import Activations, checkpoint_activations
from raytune_ft.model.load import build_model
from tests.support.models import VOCABULARY, save_tiny_llama
from tests.support.runs import largest_difference, make_config, make_inputs, run

POLICIES = get_args(Activations)


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._live:
                self._live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._live.pop, storage._cdata, None)
        return result

    def total(self) -> int:
        return sum(self._live.values())


def _forward(base: Path, policy: Activations) -> tuple[int, float, dict[str, Tensor]]:
    model = build_model(ModelConfig(path=str(base)), FullMethod(name="full"), "float32", 0)
    names = [name for name, _ in model.named_parameters()]
    checkpoint_activations(model, policy)
    assert [name for name, _ in model.named_parameters()] == names
    tokens = torch.arange(4 * 64).view(4, 64) % VOCABULARY
    with _LiveBytes() as live:
        loss = model(input_ids=tokens, use_cache=False).logits.square().mean()
        held = live.total()
        loss.backward()
    return held, loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_memory_falls_and_gradients_stay(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    found = {policy: _forward(base, policy) for policy in POLICIES}
    held = {policy: found[policy][0] for policy in POLICIES}
    assert held["none"] > 1.3 * held["selective"] > 3 * held["full"] > 0, held
    for policy in POLICIES:
        assert found[policy][1] == found["none"][1]
        assert found[policy][2].keys() == found["none"][2].keys()
        for name, gradient in found["none"][2].items():
            torch.testing.assert_close(found[policy][2][name], gradient, rtol=0, atol=1e-6)


def test_nothing_is_computed_twice_without_a_gradient(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    model = build_model(ModelConfig(path=str(base)), FullMethod(name="full"), "float32", 0)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        checkpoint_activations(model, "selective")
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, before)


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_dropout_is_drawn_once(tmp_path: Path, policy: str) -> None:
    inputs = make_inputs(tmp_path)
    changes = {"method.dropout": 0.3, "train.max_examples": 70}
    run(make_config(*inputs, changes), tmp_path / "none")
    again = changes | {"parallel.activation_checkpointing": policy}
    run(make_config(*inputs, again), tmp_path / policy)
    assert max(largest_difference(tmp_path / "none", tmp_path / policy)) < 1e-6


def test_selective_with_autocast(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    changes = {"train.precision": "bfloat16", "train.max_examples": 70}
    for policy in POLICIES:
        config = make_config(*inputs, changes | {"parallel.activation_checkpointing": policy})
        run(config, tmp_path / policy)
        assert max(largest_difference(tmp_path / "none", tmp_path / policy)) < 1e-6


class _Block(nn.Module):
    """Adds a bias to its product in place, as DeepSpeed's linear does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight)
        y += self.bias
        return y.square()


class _Product(_Block):
    """Hands out what it also uses."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.linear(x, self.weight)
        return y, y.sin()


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_a_product_that_is_changed_in_place_is_copied_before(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "find_blocks", lambda block: {"": block})
    gradients = []
    for policy in POLICIES:
        torch.manual_seed(0)
        block, x = _Block(), torch.randn(shape, requires_grad=True)
        checkpoint_activations(block, policy)
        block(x).square().sum().backward()
        gradients.append([x.grad, block.weight.grad, block.bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[2], strict=True))


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_a_product_that_is_changed_outside_of_its_block_is_refused(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "find_blocks", lambda block: {"": block})
    block = _Product()
    checkpoint_activations(block, "selective")
    y, sine = block(torch.randn(shape, requires_grad=True))
    y += 1
    with pytest.raises(RuntimeError, match="outside of its block; write full"):
        (y.sum() + sine.sum()).backward()


def test_selective_keeps_the_attention_of_gpus() -> None:
    """Fake tensors run torch's own operator; the second forward takes what the first made."""
    calls: list[str] = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    class Block(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            found = varlen_attn(hidden, hidden, hidden, starts, starts, 5, 5, window_size=(-1, 0))
            assert isinstance(found, Tensor)
            return found.tanh()

    for policy, times in {"selective": 1, "full": 2}.items():
        block = Block()
        calls.clear()
        blocks = pytest.MonkeyPatch()
        blocks.setattr(checkpointing, "find_blocks", lambda model: {"0": model})
        checkpoint_activations(block, policy)  # type: ignore[arg-type]
        blocks.undo()
        with FakeTensorMode(), Counted():
            starts = torch.empty(3, dtype=torch.int32)
            hidden = torch.empty(10, 2, 8, dtype=torch.bfloat16, requires_grad=True)
            block(hidden).sum().backward()
        assert calls.count("torch_attn::_varlen_attn") == times
        assert calls.count("torch_attn::_varlen_attn_backward") == 1
