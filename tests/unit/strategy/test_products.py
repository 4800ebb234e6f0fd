"""Products of bfloat16 that are computed in float32, against float64."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import ModelConfig
from raytune_ft.evaluate.context import runner_of
from raytune_ft.model.load import load_tokenizer
from raytune_ft.strategy import products
from raytune_ft.strategy.products import MIN_ROWS, has_products, widen_products
from tests.support.models import save_character_tokenizer, save_tiny_llama

HALF_AN_ULP = 2.0**-8
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def widened() -> Iterator[None]:
    widen_products()
    yield
    if has_products():  # a CPU whose own products other tests use
        widen_products.cache_clear()
        gc.collect()


def narrow(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize("rows", [MIN_ROWS - 1, MIN_ROWS, 40])
@pytest.mark.parametrize(
    ("product", "batched"),
    [
        (lambda c, a, b: a @ b, False),
        (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=-2.0), False),
        (lambda c, a, b: c.clone().addmm_(a, b), False),
        (lambda c, a, b: F.linear(a, b.T.contiguous(), c[0]), False),
        (lambda c, a, b: torch.bmm(a, b), True),
        (lambda c, a, b: torch.baddbmm(c, a, b, alpha=3.0), True),
        (lambda c, a, b: c.clone().baddbmm_(a, b), True),
    ],
)
def test_a_product_is_rounded_once(product: Product, batched: bool, rows: int) -> None:
    """Sums of 64 products have an error of 64 ulp of float32 at most before they are rounded."""
    torch.manual_seed(0)
    batch = (3,) * batched
    given = narrow(*batch, rows, 24), narrow(*batch, rows, 64), narrow(*batch, 64, 24)
    found = product(*given)
    exact = product(*(each.double() for each in given))
    sizes = product(*(each.double().abs() for each in given)).abs()
    assert found.dtype == torch.bfloat16
    assert ((found - exact).abs() <= HALF_AN_ULP * exact.abs() + 64 * 2.0**-23 * sizes).all()


def test_gradients_are_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through autocast, a layer and attention, as in a model."""
    torch.manual_seed(0)
    x_TI, weight_OI = torch.randn(32, 64), torch.randn(64, 64) / 8

    def gradients(dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        leaves = [each.bfloat16().to(dtype).requires_grad_() for each in (x_TI, weight_OI)]
        with torch.autocast("cpu", torch.bfloat16, autocast):
            heads = F.linear(*leaves).view(1, 32, 4, 16).transpose(1, 2)
            out = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return list(torch.autograd.grad(out.to(dtype).square().sum(), leaves))

    calls = []
    counted = products._is_narrow
    monkeypatch.setattr(products, "_is_narrow", lambda one: calls.append(one) or counted(one))
    found = gradients(torch.float32, True)
    assert calls  # it is these kernels that ran
    for ours, exact in zip(found, gradients(torch.float64, False), strict=True):
        assert (ours - exact).norm() <= 2.0**-6 * exact.norm()


def test_other_dtypes_keep_their_kernels() -> None:
    a, b = torch.randn(40, 64), torch.randn(64, 24)
    kernel = torch.mm(a, b)
    assert kernel.dtype == torch.float32
    assert torch.equal(kernel, torch.stack([a]).matmul(b)[0])
    assert torch.mm(a.double(), b.double()).dtype == torch.float64


@pytest.mark.parametrize(("dtype", "widens"), [("bfloat16", True), ("float32", False)])
def test_a_model_that_is_measured_has_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, widens: bool
) -> None:
    """As those of most files, which are in bfloat16; the strategy does not say so."""
    calls: list[str] = []
    monkeypatch.setattr(products, "has_products", lambda: False)
    monkeypatch.setattr(products, "widen_products", lambda: calls.append("widened"))
    model = ModelConfig(path=str(tmp_path / "model"))
    whole = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "base"), dtype=dtype)
    whole.save_pretrained(model.path)
    save_character_tokenizer(tmp_path / "model")
    assert runner_of(model, load_tokenizer(model)).precision == "float32"
    assert bool(calls) is widens
