"""Secrets that a run is given are in nothing that it prints, writes or tells Ray.

Each secret is a text of its own. The cluster has a token, a dashboard, Ray Train's state and the
export of events; the study is in PostgreSQL; a tracker does not answer, so its client complains.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest

from tests.support import postgres
from tests.support.commands import command, run_process
from tests.support.head import Head, start_head
from tests.support.models import save_tiny_llama
from tests.support.ports import free_port
from tests.support.runs import write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ENVIRONMENT = (
    "HF_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "RAY_AUTH_TOKEN",
)
STATE = (
    *(f"/api/v0/{kind}?detail=1&limit=9999" for kind in ("actors", "tasks", "jobs", "workers")),
    *(f"/api/v0/{kind}?detail=1&limit=9999" for kind in ("nodes", "placement_groups")),
    *(f"/api/v0/{kind}?detail=1&limit=9999" for kind in ("objects", "runtime_envs")),
    "/api/train/v2/runs/v1",
    "/api/jobs/",
    "/nodes?view=details",
    "/logical/actors",
    "/api/cluster_status",
)


@pytest.fixture(scope="module")
def canaries() -> dict[str, str]:
    """Where each is planted -> its text, which looks like no token."""
    planted = (*ENVIRONMENT, "STUDY", "URI", "PROJECT", "DATA", "MODEL", "STORAGE")
    return {
        name: f"canary{name.lower().replace('_', '')}{secrets.token_hex(6)}" for name in planted
    }


@pytest.fixture(scope="module")
def environment(canaries: dict[str, str]) -> dict[str, str]:
    """For the head and for drivers."""
    return {
        **{name: canaries[name] for name in ENVIRONMENT},
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
        "RAY_enable_export_api_write": "1",
        "RAY_raylet_start_wait_time_s": "120",  # on a busy machine
    }


@pytest.fixture(scope="module")
def head(environment: dict[str, str], canaries: dict[str, str]) -> Iterator[Head]:
    """Its folder is read while it runs."""
    head = start_head(free_port(), canaries["RAY_AUTH_TOKEN"], environment)
    try:
        yield head
    finally:
        head.kill()


def state_of(head: Head, path: str) -> bytes:
    """The answer, also where it is an error: on a busy machine one state may be missing."""
    try:
        return head.read(path)
    except HTTPError as error:
        return error.read()


def holding(texts: dict[str, bytes], canaries: dict[str, str]) -> set[tuple[str, str]]:
    return {
        (where, name)
        for where, text in texts.items()
        for name, secret in canaries.items()
        if secret.encode() in text
    }


def files_below(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_no_secret_leaves_its_place(
    head: Head,
    environment: dict[str, str],
    canaries: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgres, "PASSWORD", canaries["STUDY"])
    model = save_tiny_llama(tmp_path / canaries["MODEL"] / "model")
    data = tmp_path / canaries["DATA"]
    data.mkdir()
    write_rows(data / "rows.jsonl", 40)
    storage = tmp_path / canaries["STORAGE"]
    variables = {
        **environment,
        **head.environment,
        "PGTEST_PASSWORD": canaries["STUDY"],
        "CANARY_URI": canaries["URI"],
        "CANARY_PROJECT": canaries["PROJECT"],
        "CANARY_DATA": str(data),
        "CANARY_MODEL": str(model.parent),
        "CANARY_STORAGE": str(storage),
    }
    config = tmp_path / "config.yaml"
    with postgres.server() as study:
        config.write_text(
            f"""
            name: given
            storage: ${{CANARY_STORAGE}}
            model: {{path: "${{CANARY_MODEL}}/model"}}
            method: {{name: lora, rank: 4}}
            data: {{train: {{path: "${{CANARY_DATA}}/rows.jsonl"}}, validation: 0.2}}
            train: {{max_examples: 16, batch_size: 8, precision: float32}}
            parallel: {{workers: 1}}
            tracking:
              to: [tensorboard, mlflow]
              uri: "http://me:${{CANARY_URI}}@127.0.0.1:{free_port()}"
              project: "${{CANARY_PROJECT}}"
            search:
              trials: 1
              scheduler: null
              execution: isolated
              storage: {study}
              space: {{train.lr: {{log_uniform: [1e-4, 1e-3]}}}}
            """
        )
        done = run_process(command("sweep", str(config)), 700, **variables)
        assert done.returncode == 0, done.stderr
        state = {path: state_of(head, path) for path in STATE}
    stored = files_below(storage)
    # The run went where it was sent: it used the secrets, and Ray kept what it was told of it.
    warned = json.loads(stored["given/trials/trial-000/tracking.json"])["mlflow_warning"]
    assert "failed" in warned
    assert "given/study.db" not in stored
    assert b"RunSpec(run_dir=" in state["/api/train/v2/runs/v1"]
    assert b"TrainController" in state[STATE[0]]
    assert b"${CANARY_URI}" in stored["given/config.yaml"]
    assert any("export_events" in name for name in files_below(head.folder))
    # Names and locations are no secrets: an adapter has to name its base, a command says where it
    # wrote, and a client which experiment it did not find.
    places = {"DATA", "MODEL", "STORAGE", "PROJECT"}
    hidden = {name: text for name, text in canaries.items() if name not in places}
    assert holding({"said": (done.stdout + done.stderr).encode()}, hidden) == set()
    assert holding(stored, hidden) == set()
    assert holding(files_below(head.folder), hidden) == set()
    assert holding(state, hidden) == set()
    paths = {name: canaries[name] for name in ("DATA", "MODEL")}
    assert holding(state, paths) == set()
    assert {where.rpartition("/")[2] for where, _ in holding(stored, paths)} <= {
        "adapter_config.json",
        "README.md",
    }


def test_only_its_owner_reads_the_token_that_a_local_ray_makes(tmp_path: Path) -> None:
    start = "from raytune_ft.ray_backend.cluster import connect, leave; connect('local'); leave()"
    before = os.umask(0o022)
    try:
        done = run_process([sys.executable, "-c", start], 280, HOME=str(tmp_path))
    finally:
        os.umask(before)
    assert (done.returncode, done.stderr) == (0, "")
    token = tmp_path / ".ray/auth_token"
    assert len(token.read_text()) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
