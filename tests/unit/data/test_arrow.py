from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raytune_ft.data.arrow import numbers, texts, values_of

WRITE_AND_OPEN = """
import sys
from pathlib import Path
from pathlib import Path
import numpy as np
from raytune_ft.data.formats import Example
from raytune_ft.data.parts import Examples, Part, PartWriter
from raytune_ft.data.split import TokenizedSplit

ids, mask, path = np.arange(5, dtype=np.int32), np.arange(5) > 2, Path(sys.argv[1])
with PartWriter(path) as writer:
    writer.add(0, [Example("rows.jsonl:1", ids, mask)])
examples = Examples([Part(path, 0, 1, tuple(writer.blocks))], path.parent)
taken, _ = examples.tokens_of(np.zeros(1, np.int64))
TokenizedSplit.from_examples([(taken, mask)], {"w": np.ones((1, 2), np.float32)}).write(path)
assert TokenizedSplit.open(path).input_ids.tolist() == ids.tolist()
print("pandas" in sys.modules)
"""


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.float32])
def test_numbers_there_and_back(dtype: type) -> None:
    given = np.arange(12).astype(dtype)
    assert numbers(given).equals(pa.array(given))
    assert numbers(given[::3]).equals(pa.array(given[::3]))
    assert numbers(given[:0]).equals(pa.array(given[:0]))
    found = values_of(pa.array(given).slice(2, 5))
    np.testing.assert_array_equal(found, given[2:7])
    assert found.dtype == dtype
    assert not found.flags.writeable


@pytest.mark.parametrize("kind", [pa.binary(), pa.string(), pa.binary(4)])
def test_texts_are_what_arrow_makes_of_them(kind: pa.DataType) -> None:
    full: list[bytes | None] = [b"abcd", b"\xc3\xa4fg", b"efgh"]
    for given in (full, [None, *full, None], [None] * 9, []):
        assert texts(given, kind).equals(pa.array(given, kind))


def test_what_is_no_text_of_the_kind_is_refused() -> None:
    with pytest.raises(pa.ArrowInvalid, match="UTF8"):
        texts([b"\xff"], pa.string())
    with pytest.raises(ValueError, match="4 bytes"):
        texts([b"abc"], pa.binary(4))


def test_no_process_imports_pandas_for_its_tokens(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_AND_OPEN, tmp_path / "file"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
