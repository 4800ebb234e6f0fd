"""`raytune-ft fetch`, and training from what it left, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import command, run_process
from tests.support.hub import COMMIT, MODEL, hub_server

pytestmark = pytest.mark.e2e
CONFIG = ("jobs/quickstart.yaml", f"model.path={MODEL}", "train.epochs=null")


@pytest.mark.slow
def test_what_was_fetched_is_trained_without_a_network(tmp_path: Path) -> None:
    short = [f"storage={tmp_path}/runs", "train.max_examples=32", "data.test=null"]
    with hub_server() as hub:
        environment = hub.environment(tmp_path / "home")
        fetched = run_process(command("fetch", *CONFIG), 120, **environment)
        assert fetched.returncode == 0, fetched.stderr
        shown = fetched.stdout.replace("\n", " ")
        for word in (f"model.path={MODEL}", "this machine", "downloaded", COMMIT[:12]):
            assert word in shown
        assert hub.downloads() == 1
        again = run_process(command("fetch", *CONFIG), 120, **environment)
        assert "was there" in again.stdout
        assert hub.downloads() == 1
    environment |= {"HF_HUB_OFFLINE": "1"}
    trained = run_process(command("train", *CONFIG, *short), 300, **environment)
    assert trained.returncode == 0, trained.stderr
    other = run_process(command("fetch", *CONFIG, "model.path=org/other"), 120, **environment)
    assert other.returncode == 2
    assert other.stderr.startswith("error: model.path=org/other cannot be downloaded")
    assert other.stderr.count("\n") == 1


def test_nothing_to_fetch() -> None:
    done = run_process(command("fetch", "jobs/quickstart.yaml"), 120)
    assert done.returncode == 0, done.stderr
    assert "nothing is needed of the hub" in done.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("kind", ["train", "sweep"])
def test_workers_of_a_local_cluster_download_once(kind: str, tmp_path: Path) -> None:
    arguments = [f"storage={tmp_path}/runs", "parallel.workers=2", "train.max_examples=32"]
    if kind == "sweep":
        arguments += ["search.trials=2", "search.scheduler=null", "train.max_examples=64"]
    with hub_server() as hub:
        hub.delay_s = 2.0
        environment = hub.environment(tmp_path / "home")
        done = run_process(command(kind, *CONFIG, *arguments), 560, **environment)
        assert done.returncode == 0, done.stderr
        assert hub.downloads() == 1
