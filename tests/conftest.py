"""Fixtures that every kind of test may use, and the order of the tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FIRST = ("distributed", "ray", "nodes", "engines", "e2e")
"""Folders with the longest files. They begin first, so that no process ends with one alone."""


def pytest_configure() -> None:
    """A shell script that starts this in the background has it ignore SIGINT, and so would every
    program that a test starts and interrupts.
    """
    gc.disable()  # while the tests import what they use, as in `raytune_ft.imports`
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)
    for item in items:
        # A file shares its fixtures. Tests of several ranks run one after another, and so do those
        # of Ray: two of them at once wait for each other longer than they compute.
        folder = item.path.parent.name
        groups = {"distributed": "ranks", "ray": "ray", "nodes": "ray", "engines": "ray"}
        group = groups.get(folder, str(item.path))
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """What was imported stays, and need not be searched for garbage again and again."""
    gc.freeze()
    gc.enable()


def _rank(item: pytest.Item) -> int:
    folder = item.path.relative_to(TESTS).parts[0]
    return FIRST.index(folder) if folder in FIRST else len(FIRST)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data sets and a real pretrained model, which are no part of the repository."""
    directory = Path(os.environ.get("RAYTUNE_FT_SHARED", TESTS.parents[1] / "shared"))
    if not (directory / "data").is_dir():
        pytest.skip(f"no real data at {directory}; set RAYTUNE_FT_SHARED")
    return directory


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama and a file of rows, for tests that change neither."""
    from tests.support.runs import make_inputs

    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Estimates of memory run equal models once, and plans measure this machine once, for tests
    that make many of them.
    """
    from raytune_ft.estimate import hardware, memory
    from tests.support import traces

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "trace", traces.traced_once)
        patch.setattr(hardware, "measure", traces.measured_once)
        yield
