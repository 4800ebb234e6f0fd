"""A real cluster of two CPUs on this machine, one for all of these tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table

from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.model.load import load_tokenizer
from raytune_ft.ray_backend.cluster import connect
from tests.support.commands import started
from tests.support.runs import make_config, make_inputs, run


@pytest.fixture(scope="package", autouse=True)
def cluster() -> Iterator[None]:
    connect("local", num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="package")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="package")
def undisturbed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process, without Ray."""
    run_dir = tmp_path_factory.mktemp("single") / "run"
    run(inputs.config(), run_dir)
    return run_dir


class Inputs:
    """A tiny Llama and its tokens, and configs that use them."""

    def __init__(self, directory: Path) -> None:
        self._model, self._rows = make_inputs(directory)
        config = self.config()
        tokenizer = load_tokenizer(config.model)
        cache = directory / "cache"
        self.data_dir = prepare_data(config.data, tokenizer, config.seed, cache).path

    def config(self, **changes: Any) -> Config:
        """`train__lr=1.0` is `train.lr`."""
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return make_config(self._model, self._rows, dotted)


def reserved() -> list[dict[str, Any]]:
    """Placement groups that still hold something."""
    return [each for each in placement_group_table().values() if each["state"] != "REMOVED"]


def processes(kind: str) -> list[psutil.Process]:
    """Processes of this test's cluster that carry the name of an actor's class."""
    return started(lambda words: kind in " ".join(words))


def workers() -> list[psutil.Process]:
    """Processes of Ray Train workers."""
    return processes("RayTrainWorker")


def listening() -> set[str]:
    """Addresses at which processes of this test's cluster wait for callers."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            connections = process.net_connections("inet")
        except psutil.Error:
            continue
        found |= {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def assert_nothing_left(timeout_s: float = 10.0) -> None:
    """No placement group, no worker, every CPU free. Ray counts what was freed a bit later."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        left = reserved(), workers(), ray.available_resources().get("CPU")
        if left == ([], [], 2.0):
            return
        time.sleep(0.2)
    raise AssertionError(f"left on the cluster: {left}")
