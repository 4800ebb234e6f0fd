"""The adapted layer against PEFT's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from raytune_ft.model.methods import lora
from raytune_ft.model.methods.lora import AddedInPlace


class _Layer(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(12, 20, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.proj(x)
        return found


def _layer(dtype: torch.dtype, bias: bool = True, **options: Any) -> Linear:
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=["proj"], init_lora_weights=False, **options
    )
    model = get_peft_model(_Layer(bias).to(dtype), config)  # type: ignore[arg-type]
    layer = model.base_model.model.proj
    assert type(layer) is Linear
    return layer.to(dtype)


def _values(layer: Linear, x: Tensor, weights: Tensor) -> list[Tensor]:
    """The output and the gradients of input, A and B."""
    x = x.clone().requires_grad_()
    trained = [each for each in layer.parameters() if each.requires_grad]
    y = layer(x)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *trained])]


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    apply = lora._LinearWithAdapter.apply

    def counting(*arguments: Any) -> Any:
        calls.append(1)
        return apply(*arguments)

    monkeypatch.setattr(lora._LinearWithAdapter, "apply", counting)
    return calls


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (0, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_layer_of_peft(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, layer = _counted(monkeypatch), _layer(torch.float64, bias)
    x = torch.randn(*shape, dtype=torch.float64)
    weights = torch.randn(*shape[:-1], 20, dtype=torch.float64)
    expected = _values(layer, x, weights)
    assert not calls
    layer.__class__ = AddedInPlace
    torch.testing.assert_close(_values(layer, x, weights), expected, rtol=1e-12, atol=1e-12)
    assert calls
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected[0], rtol=1e-12, atol=1e-12)


def test_autocast_rounds_as_in_peft() -> None:
    """The base in bfloat16, the adapter in float32; both against float64."""
    exact, layer = _layer(torch.float64), _layer(torch.float32)
    layer.base_layer.to(torch.bfloat16)
    for one, other in zip(exact.parameters(), layer.parameters(), strict=True):
        other.data.copy_(one.data.bfloat16())
        one.data.copy_(other.data)
    layer.cast_input_dtype_enabled = False
    x, weights = torch.randn(2, 50, 12).bfloat16(), torch.randn(2, 50, 20).bfloat16()
    expected = _values(exact, x.double(), weights.double())
    errors = []
    for kind in (Linear, AddedInPlace):
        layer.__class__ = kind
        with torch.autocast("cpu", torch.bfloat16):
            found = _values(layer, x, weights)
        assert found[0].dtype == torch.bfloat16
        assert {each.dtype for each in found[2:]} == {torch.float32}
        errors.append(
            [
                float((one.double() - other).norm() / other.norm())
                for one, other in zip(found, expected, strict=True)
            ]
        )
    theirs, ours = errors
    assert all(one < 1.3 * other < 0.02 for one, other in zip(ours, theirs, strict=True)), errors


def _hooked(layer: Linear) -> Linear:
    layer.base_layer.register_forward_pre_hook(lambda *_: None)
    return layer


def _turned_off(layer: Linear) -> Linear:
    layer.enable_adapters(False)
    return layer


def _merged(layer: Linear) -> Linear:
    layer.merge()
    return layer


def _wide(layer: Linear) -> Linear:
    """Without autocast, PEFT casts the input to the dtype of the adapter."""
    layer.lora_A.double()
    layer.lora_B.double()
    return layer


def _trained(layer: Linear) -> Linear:
    layer.base_layer.requires_grad_()
    return layer


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"lora_dropout": 0.5}, lambda layer: layer),
        ({"use_dora": True}, lambda layer: layer),
        ({"lora_bias": True}, lambda layer: layer),
        ({}, _hooked),
        ({}, _turned_off),
        ({}, _merged),
        ({}, _wide),
        ({}, _trained),
    ],
)
def test_what_it_does_not_compute_is_left_to_peft(
    options: dict[str, Any], change: Callable[[Linear], Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _counted(monkeypatch)
    layer, x = change(_layer(torch.float32, **options)), torch.randn(3, 12)
    torch.manual_seed(1)
    expected = layer(x)
    layer.__class__ = AddedInPlace
    torch.manual_seed(1)
    assert torch.equal(layer(x), expected)
    assert not calls
