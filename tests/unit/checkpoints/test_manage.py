"""List, verify and prune, as the command line does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock

from raytune_ft.checkpoints.manage import listed, pruned, verified
from raytune_ft.checkpoints.store import CheckpointFacts, CheckpointStore
from raytune_ft.cli import run_command
from raytune_ft.errors import StorageError
from tests.support.checkpoints import commit

CONFIG = """
name: some
data: {train: {path: train.jsonl}}
checkpoint: {keep_last: 2, keep_best: 1}
"""


def make(run: Path, losses: dict[int, float | None], config: str = CONFIG) -> CheckpointStore:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config)
    store = CheckpointStore(run / "checkpoints")
    for step, loss in losses.items():
        commit(
            store,
            step,
            lambda folder: (folder / "model.safetensors").write_bytes(bytes(100)),
            CheckpointFacts(8 * step, "c", "lora", loss),
        )
    return store


def names(store: CheckpointStore) -> list[int]:
    return [manifest.step for _, manifest in store.list()]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two trials of six checkpoints; results and a promotion refer to some."""
    sweep = tmp_path / "sweep"
    losses: dict[int, float | None] = {1: 0.9, 2: 0.5, 3: None, 4: 0.6, 5: 0.7, 6: 0.8}
    for trial in ("a", "b"):
        run = sweep / "trials" / trial
        make(run, losses)
        best = {"best": {"checkpoint": "checkpoints/step-000002"}}
        (run / "result.json").write_text(json.dumps(best))
    (sweep / "config.yaml").write_text(CONFIG + "search: {space: {train.lr: {choice: [1, 2]}}}\n")
    model = sweep / "promoted" / "model"
    model.mkdir(parents=True)
    member = "/elsewhere/sweep/trials/b/checkpoints/step-000003"
    (model / "manifest.json").write_text(json.dumps({"members": [member]}))
    return sweep


def test_what_is_referred_to_is_never_pruned(sweep: Path) -> None:
    dry = pruned(str(sweep), None, None, True, print)
    told: list[str] = []
    deleted = pruned(str(sweep), None, None, False, told.append)
    assert deleted == dry
    assert told == []
    stores = [CheckpointStore(sweep / "trials" / t / "checkpoints") for t in ("a", "b")]
    assert names(stores[0]) == [2, 5, 6]
    assert names(stores[1]) == [2, 3, 5, 6]  # the third was merged into what was promoted
    pruned(str(sweep / "trials" / "b"), 1, 1, False, print)  # a trial knows its sweep
    assert names(stores[1]) == [2, 3, 6]
    rows = {row.name: row.referred for row in listed(str(sweep)) if row.run == "trials/b"}
    assert rows == {"step-000002": True, "step-000003": True, "step-000006": False}


def test_milestones_are_kept(tmp_path: Path) -> None:
    config = CONFIG.replace("keep_best: 1", "keep_best: 1, keep_every_examples: 20")
    store = make(tmp_path / "some", {step: 1 / step for step in range(1, 10)}, config)
    pruned(str(tmp_path / "some"), None, None, False, print)
    # 20, 40 and 60 examples are first reached by 24, 40 and 64; the last two are 64 and 72.
    assert names(store) == [3, 5, 8, 9]
    pruned(str(tmp_path / "some"), None, None, False, print)
    assert names(store) == [3, 5, 8, 9]


def test_what_is_damaged_is_moved_aside_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make(tmp_path / "some", {1: 0.5, 2: 0.6, 3: 0.7})
    (store.root / "step-000002" / "model.safetensors").write_bytes(b"x" * 100)
    run = str(tmp_path / "some")
    assert run_command(["checkpoints", "verify", run]) == 1
    shown = capsys.readouterr()
    assert "step-000002/model.safetensors is damaged: sha256" in shown.out
    assert "moved to" in shown.out
    assert shown.err == "error: 1 of 3 checkpoints are damaged\n"
    assert (store.root / "step-000002.damaged-1" / "model.safetensors").read_bytes() == b"x" * 100
    assert run_command(["checkpoints", "verify", run]) == 0
    assert "2 checkpoints are intact" in capsys.readouterr().out
    assert names(store) == [1, 3]
    assert run_command(["checkpoints", "list", run]) == 0
    assert "step-000003" in capsys.readouterr().out
    assert run_command(["checkpoints", "prune", run, "--keep-last", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out == ""
    assert run_command(["checkpoints", "list", str(tmp_path / "nothing")]) == 2
    assert "nothing holds no checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize(("lock", "verb"), [(".lock", "driven"), (".promoted.lock", "promoted")])
def test_a_run_that_is_in_use_is_left_alone(tmp_path: Path, lock: str, verb: str) -> None:
    store = make(tmp_path / "some", {1: 0.5, 2: 0.6, 3: 0.4, 4: 0.9})
    with FileLock(tmp_path / "some" / lock):
        for call in (
            lambda: verified(str(tmp_path / "some"), print),
            lambda: pruned(str(tmp_path / "some"), 1, 1, False, print),
        ):
            with pytest.raises(StorageError, match=f"is (being )?{verb} by another process"):
                call()
    assert names(store) == [1, 2, 3, 4]
