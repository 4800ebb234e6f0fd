"""Stacked adapters compute what PEFT computes for each of them, from what PEFT draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ModelError
from raytune_ft.model.load import Precision, build_model, load_base
from raytune_ft.model.meta import shapes_of
from raytune_ft.model.methods import trained_parameters
from raytune_ft.packed.lora import ActiveAdapters, MultiLora, init_adapter
from tests.support.models import save_tiny

RANKS, SCALES, LARGEST, INPUTS, OUTPUTS = (3, 1, 4), (2.0, 0.5, 1.0), 5, 6, 7


class _Net(nn.Module):
    """Two layers, so that a gradient goes through the upper one."""

    def __init__(self, transposed: bool, bias: bool) -> None:
        super().__init__()
        if transposed:
            self.lower: nn.Module = Conv1D(OUTPUTS, INPUTS)
            self.upper: nn.Module = Conv1D(INPUTS, OUTPUTS)
        else:
            self.lower = nn.Linear(INPUTS, OUTPUTS, bias=bias)
            self.upper = nn.Linear(OUTPUTS, INPUTS, bias=bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.upper(torch.tanh(self.lower(input_ids)))
        return hidden


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("transposed", "bias"), [(True, True), (False, True), (False, False)])
def test_forward_and_gradients(transposed: bool, bias: bool, in_place: bool) -> None:
    torch.manual_seed(0)
    net = _Net(transposed, bias).double().requires_grad_(False)
    stack = MultiLora(net, LARGEST, in_place)
    stack.adapt(["lower", "upper"])
    stack.tokens = 3 * 2 * 4
    numbers_GN = torch.zeros(3, stack.numbers, dtype=torch.float64)
    gradients_GN = torch.zeros_like(numbers_GN)
    for place in stack.slices.values():
        for half_GRX in place.pair(numbers_GN):
            for slot, rank in enumerate(RANKS):
                half_GRX[slot, :rank].normal_()
    active = ActiveAdapters(
        stack.slices,
        numbers_GN,
        gradients_GN,
        torch.tensor(SCALES, dtype=torch.float64),
        max(RANKS),
        torch.float64,
    )
    x_BSI = torch.randn(6, 4, INPUTS, dtype=torch.float64)
    wanted_BSI = torch.randn(6, 4, INPUTS, dtype=torch.float64)
    stack.model._forward_pre_hooks.clear()  # rows of numbers have no token ids
    with stack.applied(active):
        y_BSI = net(x_BSI)
        (y_BSI * wanted_BSI).sum().backward()

    leaf_GN = numbers_GN.clone().requires_grad_()
    expected = []
    for slot in range(3):
        hidden = x_BSI[2 * slot : 2 * slot + 2]
        for name, place in stack.slices.items():
            a_GRI, b_GRO = place.pair(leaf_GN)
            base = net.get_submodule(name).base_layer(hidden)  # type: ignore[operator]
            hidden = base + SCALES[slot] * (hidden @ a_GRI[slot].T) @ b_GRO[slot]
            hidden = torch.tanh(hidden) if name == "lower" else hidden
        expected.append(hidden)
    torch.testing.assert_close(y_BSI, torch.cat(expected), rtol=0, atol=1e-12)
    (torch.cat(expected) * wanted_BSI).sum().backward()
    gradient_GN = leaf_GN.grad
    assert gradient_GN is not None
    for place in stack.slices.values():
        for ours_GRX, theirs_GRX in zip(
            place.pair(gradients_GN), place.pair(gradient_GN), strict=True
        ):
            torch.testing.assert_close(ours_GRX, theirs_GRX, rtol=0, atol=1e-12)
            for slot, rank in enumerate(RANKS):
                assert not ours_GRX[slot, rank:].any()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_layer_that_sees_some_tokens_only_is_refused() -> None:
    net = _Net(False, False)
    stack = MultiLora(net, LARGEST, True)
    stack.adapt(["lower"])
    numbers_GN = torch.zeros(2, stack.numbers)
    active = ActiveAdapters(stack.slices, numbers_GN, None, torch.ones(2), LARGEST, torch.float32)
    with stack.applied(active), pytest.raises(ModelError, match="gets only some tokens"):
        net.lower(torch.zeros(5, INPUTS))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("family", "targets"), [("llama", "all-linear"), ("gpt2", ["c_attn"])])
def test_drawn_bit_for_bit_as_an_ordinary_run_draws(
    tmp_path: Path, family: str, targets: Any, precision: Precision
) -> None:
    model = ModelConfig(path=str(save_tiny(family, tmp_path)))
    method = LoraMethod(rank=3, targets=targets)
    shapes = shapes_of(load_base(model, getattr(torch, precision)))
    assert all(parameter.is_meta for parameter in shapes.parameters())
    for seed in (0, 5):
        adapter = init_adapter(shapes, method, precision, seed)
        expected = trained_parameters(build_model(model, method, precision, seed))
        assert list(adapter.weights) == list(expected)
        for name, weight in adapter.weights.items():
            assert weight.dtype == expected[name].dtype
            assert torch.equal(weight, expected[name])
