"""Tensors written in parts by several processes and read in any ranges."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from raytune_ft.errors import CheckpointError
from raytune_ft.layout import shard_name
from raytune_ft.tensors.read import open_shards
from raytune_ft.tensors.write import PARTS, Entry, Part, write_parts, write_tensors

SHAPES = [(7, 5), (13,), (), (3, 4, 5), (0, 4), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64]


def _tensors() -> dict[str, Tensor]:
    return {
        f"block.{i}.{str(dtype).removeprefix('torch.')}": (torch.randn(shape) * 9).to(dtype)
        for i, shape in enumerate(SHAPES)
        for dtype in DTYPES
    }


def _write(root: Path, tensors: dict[str, Tensor], world_size: int, seed: int) -> None:
    """Cut every tensor at random places, also so that some rank gets nothing."""
    rng = np.random.default_rng(seed)
    shares: list[dict[str, Part]] = [{} for _ in range(world_size)]
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        cuts = sorted(int(cut) for cut in rng.integers(0, len(flat) + 1, world_size - 1))
        for rank, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(flat)], strict=True)):
            shares[rank][name] = Part(tuple(tensor.shape), start, flat[start:end])
    for rank, share in enumerate(shares):
        write_parts(root, shard_name("model", rank, world_size), share)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_any_range_of_any_cut(tmp_path: Path, world_size: int) -> None:
    tensors = _tensors()
    _write(tmp_path, tensors, world_size, seed=world_size)
    rng = np.random.default_rng(0)
    with open_shards(tmp_path, "model") as found:
        assert found.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            assert torch.equal(found.whole(name), tensor)
            assert found.whole(name).dtype == tensor.dtype
            for _ in range(5):
                start, end = sorted(int(at) for at in rng.integers(0, tensor.numel() + 1, 2))
                part = Part(
                    tuple(tensor.shape), start, torch.zeros(end - start, dtype=torch.float64)
                )
                found.fill(part, name)
                assert torch.equal(part.values, tensor.reshape(-1)[start:end].double())


def test_the_library_reads_what_one_process_wrote(tmp_path: Path) -> None:
    tensors = _tensors()
    _write(tmp_path, tensors, 1, seed=0)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_record_is_of_the_bytes_on_the_disk(tmp_path: Path) -> None:
    flat = torch.arange(20_000_000, dtype=torch.float32)  # over several chunks
    record = write_parts(tmp_path, "model.safetensors", {"w": Part((5000, 4000), 0, flat)})
    content = (tmp_path / record.path).read_bytes()
    assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_file_is_noticed(tmp_path: Path, lost: int) -> None:
    flat = torch.arange(30.0)
    for rank in range(3):
        part = Part((5, 6), rank * 10, flat[rank * 10 : rank * 10 + 10])
        write_parts(tmp_path, shard_name("model", rank, 3), {"w": part})
    (tmp_path / shard_name("model", lost, 3)).unlink()
    with pytest.raises(CheckpointError, match="of the 30 of w"), open_shards(tmp_path, "model"):
        pass


def test_no_file_and_a_truncated_file(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"holds no model\.safetensors"),
        open_shards(tmp_path, "model"),
    ):
        pass
    write_parts(tmp_path, "model.safetensors", {"w": Part((30,), 0, torch.arange(30.0))})
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    damaged = r"model\.safetensors is damaged"
    with pytest.raises(CheckpointError, match=damaged), open_shards(tmp_path, "model"):
        pass


def test_others_run_while_a_file_is_written(tmp_path: Path) -> None:
    """The library's writer holds the interpreter's lock for as long as it writes."""
    longest = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    watcher = threading.Thread(target=watch)
    flat = torch.zeros(64_000_000)
    watcher.start()
    started = time.perf_counter()
    write_parts(tmp_path, "model.safetensors", {"w": Part((64_000_000,), 0, flat)})
    took = time.perf_counter() - started
    done.set()
    watcher.join()
    assert longest < took / 2, (longest, took)


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive = []

    def stream() -> Iterator[Tensor]:
        for value in range(3):
            alive.append(value)
            yield torch.full((2, 3), float(value))

    entries = [Entry(f"w{i}", torch.float32, (2, 3)) for i in range(3)]
    write_tensors(tmp_path, "model.safetensors", entries, stream())
    found = load_file(tmp_path / "model.safetensors")
    assert [found[f"w{i}"].mean().item() for i in range(3)] == alive
    assert math.prod(found["w0"].shape) == 6


def _file(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


_W = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS = {
    "no header": b"",
    "longer than the file": _file({"w": _W}, length=2**63),
    "longer than memory": _file({"w": _W}, length=10**12),
    "nested": _file(b'{"w":' * 100_000),
    "not UTF-8": _file(b"\xff\xfe{}"),
    "behind the end": _file({"w": _W | {"data_offsets": [0, 10**15], "shape": [10**15 // 4]}}),
    "before the beginning": _file({"w": _W | {"data_offsets": [-16, 0]}}),
    "overlapping": _file({"w": _W, "v": _W}),
    "a hole": _file({"w": _W}, data=bytes(64)),
    "a shape that overflows": _file({"w": _W | {"shape": [2**62, 4]}}),
    "a negative shape": _file({"w": _W | {"shape": [-4]}}),
    "an unknown type": _file({"w": _W | {"dtype": "EVIL"}}),
    "a list": _file([_W]),
    "parts that are text": _file({"__metadata__": {PARTS: "[1"}, "w": _W}),
    "parts that are a list": _file({"__metadata__": {PARTS: "[]"}, "w": _W}),
    "parts that overlap": _file({"__metadata__": {PARTS: '{"w": [-2, [4]]}'}, "w": _W}),
    "parts of a huge tensor": _file({"__metadata__": {PARTS: '{"w": [0, [9999999999]]}'}, "w": _W}),
    "parts of no shape": _file({"__metadata__": {PARTS: '{"w": [0, "4"]}'}, "w": _W}),
    "parts with one number": _file({"__metadata__": {PARTS: '{"w": 0}'}, "w": _W}),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_was_made_to_harm(tmp_path: Path, what: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(HEADERS[what])
    with pytest.raises(CheckpointError, match=r"model\.safetensors|holds elements up to"):
        open_shards(tmp_path, "model").__enter__()


def test_the_header_that_they_are_made_from_is_sound(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(_file({"w": _W}))
    with open_shards(tmp_path, "model") as found:
        assert found.whole("w").tolist() == [0.0] * 4
