"""The losses of a curriculum and a teacher's logits, measured once and kept beside the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytune_ft.data.order import Numbers
from raytune_ft.data.prepared import PreparedData, derived, sha256_of_numbers
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.files import sha256_of
from raytune_ft.layout import BASE_LOSS, TEACHER_LOGITS


def with_base_loss(
    prepared: PreparedData, model_sha256: str, measure: Callable[[TokenizedSplit], Numbers]
) -> PreparedData:
    """The same data with the loss of every training example under the model of that hash.

    The losses are measured once and kept in a separate folder: on another machine, or under another
    layout, they would differ in the last digits, and examples of nearly equal loss would change
    places.

    Raises:
        StorageError: it cannot be written.
    """

    def add(folder: Path) -> dict[str, str]:
        losses = measure(prepared.train).astype(np.float32)
        np.save(folder / BASE_LOSS, losses)
        return {"base_loss": sha256_of_numbers(losses)}

    return derived(prepared, model_sha256, add)


BFLOAT16 = np.dtype(np.int16)
"""numpy has no bfloat16: the file holds the bits as integers."""

Part = tuple[int, Tensor]
"""An example of the split, and `logits_NV` at its label tokens."""


def stored(precision: str) -> np.dtype[Any]:
    """The file's dtype for logits of a run in this precision."""
    return BFLOAT16 if precision == "bfloat16" else np.dtype(precision)


def tensor_of(logits_NV: npt.NDArray[Any]) -> Tensor:
    """The logits in a copy of the file's rows."""
    found = torch.from_numpy(logits_NV)
    return found.view(torch.bfloat16) if logits_NV.dtype == BFLOAT16 else found


def first_rows(split: TokenizedSplit) -> npt.NDArray[np.int64]:
    """`[n + 1]`: the rows of example i are `[i]` to `[i + 1]`, exclusive."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(split.label_counts)])


def with_teacher_logits(
    prepared: PreparedData, teacher_sha256: str, write: Callable[[Path], None]
) -> PreparedData:
    """The same data with the teacher's logits; `write` fills their file if there is none yet.

    `teacher_sha256` is the hash of everything else that they depend on.

    Raises:
        StorageError: they cannot be written.
    """

    def add(folder: Path) -> dict[str, str]:
        write(folder / TEACHER_LOGITS)
        sha256 = sha256_of(folder / TEACHER_LOGITS)
        return {"teacher": teacher_sha256, "teacher_logits": sha256}

    return derived(prepared, teacher_sha256, add)


def write_logits(
    path: Path, split: TokenizedSplit, width: int, precision: str, parts: Iterable[Part]
) -> bool:
    """Write `parts`, every example of the split once, in any order. Whether no logit was rounded.

    The file is not memory-mapped: with a mapping a full disk would raise a signal and no error.
    """
    first, dtype, exact = first_rows(split), stored(precision), True
    header = {"descr": dtype.str, "fortran_order": False, "shape": (int(first[-1]), width)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        begin = file.tell()
        for example, logits_NV in parts:
            assert logits_NV.shape[1] == width
            kept_NV = logits_NV.to(getattr(torch, precision)).cpu()
            exact = exact and torch.equal(kept_NV.to(logits_NV), logits_NV)
            kept_NV = kept_NV.view(torch.int16) if dtype == BFLOAT16 else kept_NV
            file.seek(begin + int(first[example]) * width * dtype.itemsize)
            file.write(kept_NV.numpy().tobytes())
    return exact
