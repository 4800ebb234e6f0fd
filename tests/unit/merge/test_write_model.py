"""Writing in shards: killed, damaged, continued, refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import ModelConfig
from raytune_ft.config.section import parse_size
from raytune_ft.errors import ConfigError, StorageError
from raytune_ft.layout import JOURNAL
from raytune_ft.merge import write_model
from raytune_ft.merge.fold import fold
from tests.support.models import save_tiny_llama
from tests.unit.merge.test_fold_variants import LINEAR, TOKENS, adapt

# Counts the writes of the process and dies before number `kill_at`.
CHILD = """
    import os, pathlib, signal, sys, torch
    from raytune_ft.config.schema import ModelConfig
    from raytune_ft.merge.fold import fold
    from raytune_ft.tensors import write
    kill_at, count, original = int(sys.argv[4]), [0], os.write
    def counted(descriptor, data):
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
        return original(descriptor, data)
    write.os.write = counted
    base, adapter, target = map(pathlib.Path, sys.argv[1:4])
    fold(ModelConfig(path=str(base)), adapter, target,
         [torch.arange(5, 29), torch.arange(40, 50)], "20KB")
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fold")
    base = save_tiny_llama(folder / "base")
    return base, adapt(base, folder / "adapter", target_modules=LINEAR)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors"}


def test_an_interrupted_fold_goes_on(
    tmp_path: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = ModelConfig(path=str(inputs[0])), tmp_path / "out"
    fold(model, inputs[1], tmp_path / "once", TOKENS, "20KB")
    written: list[str] = []
    write = write_model.write_tensors

    def interrupted(root: Path, name: str, *arguments: Any) -> Any:
        if len(written) == 2:
            (root / name).write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(name)
        return write(root, name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(write_model, "write_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fold(model, inputs[1], target, TOKENS, "20KB")
    told: list[str] = []
    fold(model, inputs[1], target, TOKENS, "20KB", tell=told.append)
    assert told == [f"2 of {len(content(target))} shards are already written"]
    assert content(target) == content(tmp_path / "once")
    assert not list(target.glob(".*"))


@pytest.mark.stress
def test_killed_three_times_and_damaged_it_gives_the_same_bytes(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    fold(ModelConfig(path=str(inputs[0])), inputs[1], tmp_path / "once", TOKENS, "20KB")
    target = tmp_path / "killed"
    code = textwrap.dedent(CHILD)
    finished = []
    for kill_at in (6, 17, 11):
        ended = subprocess.run(
            [sys.executable, "-c", code, *map(str, (*inputs, target)), str(kill_at)], check=False
        )
        assert ended.returncode == -signal.SIGKILL
        assert not (target / "manifest.json").exists()
        shards = json.loads((target / JOURNAL).read_text())["shards"]
        assert set(content(target)) - {s["path"] for s in shards} <= {
            p.name for p in target.glob(".model*")
        }
        finished.append(len(shards))
    assert finished == sorted(finished)
    assert finished[0] < finished[-1]
    first = target / shards[0]["path"]  # which is damaged in the meantime, and written again
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    told: list[str] = []
    fold(ModelConfig(path=str(inputs[0])), inputs[1], target, TOKENS, "20KB", tell=told.append)
    assert told == [f"{finished[-1] - 1} of {len(content(target))} shards are already written"]
    assert content(target) == content(tmp_path / "once")
    assert not list(target.glob(".*"))


def test_nothing_is_overwritten(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    model, target = ModelConfig(path=str(inputs[0])), tmp_path / "out"
    fold(model, inputs[1], target, TOKENS)
    before = content(target)
    with pytest.raises(StorageError, match=r"holds model\.safetensors of other work"):
        fold(model, inputs[1], target, TOKENS, dtype=torch.bfloat16)
    assert content(target) == before
    (target / JOURNAL).write_text(json.dumps({"plan": "another", "shards": []}))
    with pytest.raises(StorageError, match="nothing is overwritten"):
        fold(model, inputs[1], target, TOKENS)
    assert content(target) == before


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "5XB", "-1GB", "0"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size; write for example 5GB"):
        parse_size(text)
