"""Arrow arrays from and to numpy arrays and bytes.

`pa.array` and `Array.to_numpy` import pandas wherever it is installed, which takes 0.6 s of CPU
time in each process. These functions do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def numbers(values: npt.NDArray[np.generic]) -> pa.Array:
    """[n], an array over the same memory."""
    kind = pa.from_numpy_dtype(values.dtype)
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(kind, len(values), buffers)


def values_of(array: pa.Array) -> Any:
    """[n], a numpy array over the memory of an array of numbers without nulls; not writable."""
    return np.from_dlpack(array)


def texts(values: Sequence[bytes | None], kind: pa.DataType) -> pa.Array:
    """[n] of `kind`, which is binary, a string in UTF-8, or binary of one width; None is null.

    Raises:
        pa.ArrowInvalid: a value is not UTF-8, or all of them take 2 GiB or more.
        ValueError: a value is of another width.
    """
    valid = np.array([one is not None for one in values], np.bool_)
    bits = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    if pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        if any(one is not None and len(one) != width for one in values):
            raise ValueError(f"a value is not of {width} bytes")
        flat = b"".join(bytes(width) if one is None else one for one in values)
        return pa.Array.from_buffers(kind, len(values), [bits, pa.py_buffer(flat)])
    ends = np.cumsum([0, *(len(one or b"") for one in values)], dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:
        raise pa.ArrowInvalid(f"{ends[-1]} bytes in one array")
    flat = b"".join(one or b"" for one in values)
    buffers = [bits, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(flat)]
    array = pa.Array.from_buffers(kind, len(values), buffers)
    array.validate(full=True)
    return array
