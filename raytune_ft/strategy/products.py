"""Products of bfloat16 on a CPU that has no instructions for them.

Without AVX-512, as on most laptops, torch multiplies matrices of bfloat16 in a plain loop, 7 to 20
times slower than those of float32. Here the factors are widened, multiplied in float32, and the
product is rounded once. That is what instructions for bfloat16 do: only the order of sums differs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

MIN_ROWS = 8
"""With fewer rows or columns, widening the factors takes longer than the product."""
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")
ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


def has_products() -> bool:
    """Whether oneDNN can multiply in bfloat16 on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widen_where_slow(device: torch.device, *dtypes: torch.dtype) -> None:
    """Widen products where one of `dtypes` is bfloat16 and `device` is a CPU without its own."""
    if torch.bfloat16 in dtypes and device.type == "cpu" and not has_products():
        widen_products()


@cache
def widen_products() -> torch.library.Library:
    """From now on, compute products of bfloat16 on the CPU of this process in float32, for as long
    as the library that is returned exists. Other dtypes keep their kernels.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that kernels are replaced
        for name in (*PRODUCTS, *ATTENTION):
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed
            function = partial(_widened, kernel, name in PRODUCTS, name.endswith("_"))
            library.impl(name, function, "CPU", with_keyset=True)
    return library


def _widened(
    kernel: Callable[..., Any], product: bool, in_place: bool, keys: Any, *given: Any, **named: Any
) -> Any:
    """What `kernel` computes of `given`, whose first is a tensor; `product`: of the last two."""
    if given[0].dtype != torch.bfloat16 or (product and not _is_large(*given[-2:])):
        return kernel(keys, *given, **named)
    wide = [one.float() if _is_narrow(one) else one for one in given]
    more = {name: one.float() if _is_narrow(one) else one for name, one in named.items()}
    found = kernel(keys, *wide, **more)
    if in_place:
        return given[0].copy_(found)
    if product:
        return found.to(torch.bfloat16)
    # A forward of attention also gives logarithms of sums `[E, H, L]`, always in float32.
    rank = given[0].ndim
    return tuple(each.to(torch.bfloat16) if each.ndim == rank else each for each in found)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _is_large(left: Tensor, right: Tensor) -> bool:
    return min(left.shape[-2], right.shape[-1]) >= MIN_ROWS
