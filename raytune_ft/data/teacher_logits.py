"""A teacher's logits at the label tokens of the training split, in a file that workers map."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytune_ft.data.order import Numbers
from raytune_ft.data.prepare import PreparedData, derived, sha256_of_numbers
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.files import sha256_of
from raytune_ft.layout import BASE_LOSS, TEACHER_LOGITS


def with_base_loss(
    prepared: PreparedData, model_sha256: str, measure: Callable[[TokenizedSplit], Numbers]
) -> PreparedData:
    """The same data with the loss of every training example under the model of that hash.

    It is measured once and kept in a folder of its own: on another machine, or under another
    layout, it would differ in its last digits, and examples of about equal losses would change
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
"""Which numpy does not know: the bits of such numbers lie in the file as integers."""

Part = tuple[int, Tensor]
"""An example of the split, and `logits_NV` at its label tokens."""


def stored(precision: str) -> np.dtype[Any]:
    """As logits come out of the matrix products of a run in this precision."""
    return BFLOAT16 if precision == "bfloat16" else np.dtype(precision)


def tensor_of(logits_NV: npt.NDArray[Any]) -> Tensor:
    """Of a copy of rows of the file."""
    found = torch.from_numpy(logits_NV)
    return found.view(torch.bfloat16) if logits_NV.dtype == BFLOAT16 else found


def first_rows(split: TokenizedSplit) -> npt.NDArray[np.int64]:
    """`[n + 1]`: the rows of example i are those from `[i]` to `[i + 1]`, without it."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(split.label_counts)])


def with_teacher_logits(
    prepared: PreparedData, teacher_sha256: str, write: Callable[[Path], None]
) -> PreparedData:
    """The same data with the logits that `write` puts into a file, where none are there yet.

    `teacher_sha256` is of all that they depend on beside the data.

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
    """Every example of the split once, in any order. Was nothing rounded on the way?

    Not through a mapping, where a full disk would be a signal and no error.
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
