"""A model of the hub is downloaded once a node, at one commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_ft.config.load import apply_overrides
from raytune_ft.config.schema import ModelConfig
from raytune_ft.model.hub import named_models, pin, revision_of, trained_models
from tests.support.hub import COMMIT, MODEL, Hub, hub_server
from tests.unit.config.test_identity import CONFIG

FETCH = """
import json, sys
from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import RaytuneFtError
from raytune_ft.model.hub import commit_of, fetch
model = ModelConfig(path=sys.argv[1])
try:
    found = fetch(model, commit_of(model), lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps([found.folder, found.bytes, found.new]))
except RaytuneFtError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


def start(hub: Hub, home: Path, model: str = MODEL, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, model],
        env=os.environ | hub.environment(home) | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_of_one_node_download_it_once(hub: Hub, tmp_path: Path) -> None:
    hub.delay_s = 3.0
    processes = [start(hub, tmp_path / "home") for _ in range(4)]
    answers = [process.communicate(timeout=120) for process in processes]
    found = [json.loads(out) for out, _ in answers]
    assert {folder for folder, *_ in found} == {
        str(tmp_path / f"home/hub/models--org--tiny/snapshots/{COMMIT}")
    }
    assert sorted(new for *_, new in found) == [False] * 3 + [True]
    assert hub.downloads() == hub.downloads("config.json") == 1
    assert sum("downloads org/tiny; waiting" in errors for _, errors in answers) >= 1
    weights = Path(found[0][0]) / "model.safetensors"
    assert found[0][1] > weights.stat().st_size > 0


def test_a_download_that_was_killed_is_taken_over(hub: Hub, tmp_path: Path) -> None:
    hub.delay_s = 4.0
    first = start(hub, tmp_path / "home")
    deadline = time.monotonic() + 60
    while not hub.downloads():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = start(hub, tmp_path / "home")
    time.sleep(1.0)
    first.kill()
    assert first.wait() < 0
    hub.delay_s = 0.0
    out, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert json.loads(out)[2]


def test_what_lies_in_the_cache_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    start(hub, tmp_path / "home").communicate(timeout=120)
    before = len(hub.requests)
    out, errors = start(hub, tmp_path / "home", HF_HUB_OFFLINE="1").communicate(timeout=120)
    assert not json.loads(out)[2], errors
    assert len(hub.requests) == before


@pytest.mark.parametrize(("model", "offline"), [(MODEL, "1"), ("org/absent", "0")])
def test_what_cannot_be_had_is_one_line(hub: Hub, tmp_path: Path, model: str, offline: str) -> None:
    process = start(hub, tmp_path / "home", model, HF_HUB_OFFLINE=offline)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.startswith(f"error: model.path={model} cannot be downloaded (")
    assert errors.count("\n") == 1
    assert "raytune-ft fetch" in errors


def test_the_models_that_a_config_names(tmp_path: Path) -> None:
    changes = {
        "model.path": "org/student",
        "model.revision": "v1",
        "train.objective": "kd",
        "train.kd.teacher": "org/teacher",
        "promote.base": str(tmp_path),
        "rewards": [
            {"name": "model", "path": "org/rm", "revision": "v2"},
            {"name": "model", "label": "here", "path": str(tmp_path)},
        ],
    }
    config = apply_overrides(CONFIG, changes)
    named = named_models(config)
    assert list(named) == [
        *("model.path=org/student", "train.kd.teacher=org/teacher"),
        "rewards.model.path=org/rm",
    ]
    assert [model.revision for model in named.values()] == ["v1", None, "v2"]
    assert [model.path for model in trained_models(config)] == ["org/student", "org/teacher"]
    on_disk = apply_overrides(config, {"train.kd.cache": "disk"})
    assert [model.path for model in trained_models(on_disk)] == ["org/student"]
    assert named_models(CONFIG) == {}


def test_a_process_loads_the_commit_that_it_was_told() -> None:
    model = ModelConfig(path="org/pinned", revision="v2")
    assert revision_of(model) == "v2"
    pin(model, COMMIT)
    assert revision_of(model) == COMMIT
    assert revision_of(ModelConfig(path="org/pinned")) == "main"
