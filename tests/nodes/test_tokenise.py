"""Parts of the tokens as tasks on two nodes, one of which dies in the middle."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from raytune_ft.config.data import DataConfig
from raytune_ft.config.schema import ModelConfig
from raytune_ft.data.prepare import prepare_data
from raytune_ft.model.load import load_tokenizer
from raytune_ft.ray_backend import tokenise
from tests.nodes.conftest import Nodes
from tests.unit.data.test_parts import content, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def kill_a_task(killed: list[str], over: threading.Event) -> None:
    """The first process that makes a part."""
    while not over.is_set() and not killed:
        for process in psutil.process_iter(["cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            if title.startswith("ray::make_part_here"):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(title)
                break
        time.sleep(0.01)


@pytest.mark.slow
def test_two_nodes_give_the_bytes_of_one_process(nodes: Nodes, tmp_path: Path) -> None:
    nodes.have(2)
    tokenizer = load_tokenizer(ModelConfig(path="builtin:tiny"))
    source = {"path": str(write_rows(tmp_path / "a.jsonl", 6000))}
    data = DataConfig.model_validate({"train": source, "max_bad_fraction": 0.2})
    expected = content(prepare_data(data, tokenizer, 0, tmp_path / "alone"))
    killed, lines, over = list[str](), list[str](), threading.Event()
    killer = threading.Thread(target=kill_a_task, args=(killed, over))
    killer.start()
    try:
        found = prepare_data(
            data,
            tokenizer,
            0,
            tmp_path / "cache",
            lines.append,
            workers=tokenise.spread,
            piece_bytes=50_000,
        )
    finally:
        over.set()
        killer.join()
    assert killed
    assert content(found) == expected
    assert any("parts as tasks on 2 CPUs" in line for line in lines)
    assert len(list((tmp_path / "cache").iterdir())) == 1
