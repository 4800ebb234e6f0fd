"""What torch may choose on a GPU in this process: which kernels, and how they round.

Everything here is a switch of the whole process. On a CPU none of it changes a number; what is
chosen there is in `products`.
"""

from __future__ import annotations

import os

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def settle() -> None:
    """Set the switches that hold for every run; called before a model is laid out.

    - Products of float32 are computed in float32. `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`, which some
      images set, would round their factors to 10 bits (TF32).
    - Sums inside a product of bfloat16 stay in float32, so that layouts differ less.
    - cuDNN's attention is left out. It makes a plan for every new shape, which takes up to a second
      where nearly every micro-batch has one, and torch prefers it on H100 and later.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def be_deterministic(wanted: bool) -> None:
    """Use algorithms that give the same bits every time, or torch's choice; `train.deterministic`.

    An operation that has no such algorithm then raises the RuntimeError that `without_algorithm`
    knows.
    """
    if wanted:
        os.environ[WORKSPACE] = ":4096:8"  # torch asks for one of two values, here the faster
        torch.backends.cudnn.benchmark = False
        # Else every new tensor is filled first; nothing here reads one that was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(wanted)


def without_algorithm(error: BaseException) -> str | None:
    """The operation that `be_deterministic` forbids, None where the error is another one."""
    name, found, _ = str(error).partition(" does not have a deterministic implementation")
    return name if found and isinstance(error, RuntimeError) else None
