"""The copy that a checkpoint is written from lies in one piece of memory, each time the same."""

from __future__ import annotations

import gc
import mmap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from raytune_ft.records import Progress
from raytune_ft.tensors.write import Part
from raytune_ft.train.checkpoint import SnapshotTaker, host_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Holder:
    """Weights of different sizes and dtypes, each with one moment."""

    device = CPU

    def __init__(self, *sizes: int) -> None:
        self.weights: dict[str, Tensor] = {}
        self.resize(*sizes)

    def resize(self, *sizes: int) -> None:
        dtypes = (torch.float32, torch.float64, torch.bfloat16)
        self.weights = {
            f"{number}": torch.randn(size).to(dtypes[number % 3])
            for number, size in enumerate(sizes)
        }

    def parts(self, name: str) -> dict[str, Part]:
        weight = self.weights[name]
        return {
            "": Part(tuple(weight.shape), 0, weight, writes=name != "1"),
            "exp_avg": Part(tuple(weight.shape), 0, weight.double() * 2),
        }


def test_one_piece_of_memory_holds_every_part_and_is_used_again() -> None:
    holder = Holder(5, 7, 3, 0)
    taker = SnapshotTaker(holder, list(holder.weights))  # type: ignore[arg-type]
    first = taker.take(Progress(step=1))
    assert list(first.weights) == ["0", "2", "3"]  # another rank writes "1"
    assert list(first.moments) == [f"{name}.exp_avg" for name in holder.weights]
    pieces = {
        part.values.untyped_storage().data_ptr()
        for part in [*first.weights.values(), *first.moments.values()]
    }
    assert len(pieces) == 1
    for number in (1, 2):
        for weight in holder.weights.values():
            weight.mul_(3)
        taken = taker.take(Progress(step=number))
        for name in ("0", "2", "3"):
            assert torch.equal(taken.weights[name].values, holder.weights[name])
            assert taken.weights[name].values.dtype == holder.weights[name].dtype
        for name, weight in holder.weights.items():
            moment = taken.moments[f"{name}.exp_avg"].values
            assert torch.equal(moment, weight.double() * 2)
        assert {part.values.untyped_storage().data_ptr() for part in taken.weights.values()} == (
            pieces
        )


def test_a_snapshot_is_a_copy() -> None:
    holder = Holder(5, 7)
    taken = SnapshotTaker(holder, ["0", "1"]).take(Progress())  # type: ignore[arg-type]
    before = holder.weights["0"].clone()
    holder.weights["0"].zero_()
    assert torch.equal(taken.weights["0"].values, before)


def test_memory_grows_where_parts_do() -> None:
    """A slot of an engine gets adapters of another rank."""
    holder = Holder(2, 2)
    taker = SnapshotTaker(holder, ["0", "1"])  # type: ignore[arg-type]
    taker.take(Progress())
    holder.resize(500, 9)
    taken = taker.take(Progress())
    assert torch.equal(taken.weights["0"].values, holder.weights["0"])
    assert torch.equal(taken.moments["1.exp_avg"].values, holder.weights["1"].double() * 2)


def test_on_a_gpu_whole_pages_are_locked_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: dict[int, int] = {}

    def register(at: int, size: int, flags: int) -> int:
        assert flags == 0
        locked[at] = size
        return 0

    def unregister(at: int) -> int:
        del locked[at]
        return 0

    runtime: Any = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    size = 5 * mmap.PAGESIZE + 1
    memory = host_memory(size, GPU)
    assert size <= len(memory) < size + mmap.PAGESIZE  # not a power of two
    assert locked == {memory.data_ptr(): len(memory)}
    assert memory.data_ptr() % mmap.PAGESIZE == len(memory) % mmap.PAGESIZE == 0
    view = memory[:64].view(torch.float32)
    del memory
    gc.collect()
    assert locked, "a view still refers to it"
    del view
    gc.collect()
    assert not locked
    assert not host_memory(size, CPU).is_pinned()
    assert not locked
