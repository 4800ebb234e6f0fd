"""The store is tested by breaking things: bits, files, processes and disks."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from raytune_ft.checkpoints import store as store_module
from raytune_ft.checkpoints.store import CheckpointFacts, CheckpointStore
from raytune_ft.config.schema import ParallelConfig
from raytune_ft.errors import CheckpointError
from raytune_ft.layout import MANIFEST, step_name
from raytune_ft.strategy.single import Single
from raytune_ft.train.setup import where_to_resume
from tests.support.checkpoints import commit, file_size_limit

FILES = {
    "adapter_model.safetensors": 300,
    "state/optimizer.safetensors": 500,
    "state/state.json": 7,
}


def write(folder: Path) -> None:
    for name, size in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(random.Random(name).randbytes(size))


def facts(
    eval_loss: float | None = None, config: str = "c", accuracy: float = 0.0
) -> CheckpointFacts:
    return CheckpointFacts(8, config, "lora", eval_loss, {"eval_token_accuracy": accuracy})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def newest(store: CheckpointStore) -> Path | None:
    """Where a run goes on whose budget every checkpoint suits."""
    suits: Any = SimpleNamespace(is_on_the_way=lambda step, examples: True)
    return where_to_resume(store, suits, Single(ParallelConfig(), "float32"))


def names(store: CheckpointStore) -> list[str]:
    return [path.name for path, _ in store.list()]


def hidden(store: CheckpointStore) -> list[str]:
    return [path.name for path in store.root.glob(".*")]


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_commit_is_listed_verified_and_found(store: CheckpointStore) -> None:
    assert newest(store) is None
    assert store.list() == []
    path = commit(store, 120, write, facts(0.5))
    assert path == store.root / "step-000120"
    manifest = store.verify(path)
    assert (manifest.step, manifest.examples, manifest.eval_loss) == (120, 8, 0.5)
    assert {file.path: file.bytes for file in manifest.files} == FILES
    assert newest(store) == path
    assert store.list() == [(path, manifest)]
    assert hidden(store) == []


def test_steps_sort_as_numbers(store: CheckpointStore) -> None:
    for step in (1_000_000, 999_999, 5):
        commit(store, step, write, facts())
    assert names(store) == ["step-000005", "step-999999", "step-1000000"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named_and_the_older_checkpoint_taken(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    older, newer = (commit(store, step, write, facts()) for step in (1, 2))
    flip(newer / name, 29)
    with pytest.raises(CheckpointError, match=f"step-000002/{name} is damaged"):
        store.verify(newer)
    assert newest(store) == older
    (said,) = caplog.messages
    assert name in said
    assert newer.exists()


def test_any_flipped_bit_of_the_manifest_is_found(store: CheckpointStore) -> None:
    older, newer = (commit(store, step, write, facts(0.25)) for step in (1, 2))
    manifest = newer / MANIFEST
    whole = manifest.read_bytes()
    for bit in range(len(whole) * 8):
        flip(manifest, bit)
        with pytest.raises(CheckpointError, match=MANIFEST):
            store.verify(newer)
        manifest.write_bytes(whole)
    store.verify(newer)
    flip(manifest, 77)
    assert newest(store) == older
    assert names(store) == [older.name]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_truncated_and_missing_files_are_named(store: CheckpointStore, name: str) -> None:
    path = commit(store, 1, write, facts())
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        store.verify(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        store.verify(path)
    assert newest(store) is None
    assert store.list() == []


def test_a_copy_under_another_step_is_refused_and_strays_are_not(store: CheckpointStore) -> None:
    path = commit(store, 1, write, facts())
    (path / "note.txt").write_text("mine")
    store.verify(path)
    path.rename(store.root / "step-000007")
    with pytest.raises(CheckpointError, match="is of step 1"):
        store.verify(store.root / "step-000007")


def test_a_valid_checkpoint_is_kept_and_a_damaged_or_foreign_one_replaced(
    store: CheckpointStore,
) -> None:
    def never(folder: Path) -> None:
        raise AssertionError("written again")

    path = commit(store, 1, write, facts())
    assert commit(store, 1, never, facts()) == path
    flip(path / "state/state.json", 3)
    commit(store, 1, write, facts())
    store.verify(path)
    commit(store, 1, write, facts(eval_loss=0.5))  # the same step, now measured
    assert commit(store, 1, never, facts()) == path
    assert store.verify(path).eval_loss == 0.5
    commit(store, 1, write, facts(config="another"))
    assert store.verify(path).config_sha256 == "another"
    assert hidden(store) == []


def test_a_failed_write_leaves_nothing(store: CheckpointStore) -> None:
    def broken(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    commit(store, 1, write, facts())
    with pytest.raises(KeyboardInterrupt):
        commit(store, 2, broken, facts())
    assert names(store) == ["step-000001"]
    assert hidden(store) == []


# Killed processes. The child counts every write, fsync and rename, and dies before number `k`.
CHILD = """
    import os, pathlib, signal, sys
    from raytune_ft.checkpoints.manifest import flush_files
    from raytune_ft.checkpoints.store import CheckpointStore, CheckpointFacts
    root, kill_at, step = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    done = []
    def counted(name, function):
        def call(*args, **kwargs):
            if len(done) == kill_at:
                print(name, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(name)
            return function(*args, **kwargs)
        return call
    os.fsync = counted("fsync", os.fsync)
    pathlib.Path.rename = counted("rename", pathlib.Path.rename)
    pathlib.Path.write_bytes = counted("write", pathlib.Path.write_bytes)
    def write(folder):
        (folder / "a.safetensors").write_bytes(b"a" * 1000)
        (folder / "state").mkdir()
        (folder / "state" / "b.safetensors").write_bytes(b"b" * 1000)
    store = CheckpointStore(root)
    facts = CheckpointFacts(8, "c", "lora", 0.5 / step)
    folder = store.begin(step, facts)
    write(folder)
    store.finish(folder, step, facts, flush_files(folder))
    if len(sys.argv) > 4:
        store.retain(2, 1, "min")
    print("end", ",".join(done))
"""


def child(root: Path, kill_at: int, step: int, *more: str) -> tuple[int, str]:
    """Return code, and what the child was about to do (or did) when it ended."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(root), str(kill_at), str(step), *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    return ended.returncode, ended.stdout.strip()


def test_a_kill_anywhere_in_a_commit_leaves_whole_checkpoints(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    store = CheckpointStore(root)
    commit(store, 1, write, facts(0.5))
    _, done = child(tmp_path / "other", 1000, 2)
    operations = done.removeprefix("end ").split(",")
    # two files, their fsyncs, the manifest's, two folders', the rename, the root's
    assert operations == ["write"] * 2 + ["fsync"] * 5 + ["rename", "fsync"]
    for kill_at, operation in enumerate(operations):
        code, last = child(root, kill_at, 2)
        assert (code, last) == (-signal.SIGKILL, operation)
        published = "rename" in operations[:kill_at]
        assert names(store) == ["step-000001"] + ["step-000002"] * published
        for path, _ in store.list():
            store.verify(path)
    assert names(store) == ["step-000001", "step-000002"]
    assert hidden(store) != []
    assert child(root, 1000, 3)[0] == 0
    store.retain(2, 1, "min")
    assert hidden(store) == []
    assert "step-000003" in names(store)


def test_the_next_commit_works_after_a_kill_between_manifest_and_rename(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert child(root, 7, 2) == (-signal.SIGKILL, "rename")
    store = CheckpointStore(root)
    assert [path.name for path in root.glob(f".*/{MANIFEST}")] == [MANIFEST]
    assert newest(store) is None
    path = commit(store, 2, write, facts())
    assert newest(store) == path


def test_a_kill_while_deleting_never_shows_half_a_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    store = CheckpointStore(root)
    for step in (1, 2, 3):
        commit(store, step, write, facts(1.0 / step))
    # Operations 0-8 are the commit; 9 renames step-000001 away, 10 is that rename's fsync.
    assert child(root, 10, 4, "retain") == (-signal.SIGKILL, "fsync")
    assert names(store) == ["step-000002", "step-000003", "step-000004"]
    for path, _ in store.list():
        store.verify(path)
    assert store.retain(2, 1, "min") == ["step-000002"]
    assert hidden(store) == []


def test_rubbish_of_the_living_is_left(store: CheckpointStore) -> None:
    commit(store, 1, write, facts())
    mine = store._hidden("step-000002", "new")
    mine.mkdir()
    parent = store.root / mine.name.replace(f".{os.getpid()}.", f".{os.getppid()}.")
    parent.mkdir()
    elsewhere = store.root / f".step-000002.another-host.{os.getpid()}.0123456789abcdef.new"
    elsewhere.mkdir()
    reused_pid = store.root / mine.name.replace(store_token(mine), "f" * 16)
    reused_pid.mkdir()
    store.retain(2, 1, "min")
    assert mine.exists()
    assert parent.exists()
    assert elsewhere.exists()
    assert not reused_pid.exists()
    os.utime(elsewhere, (0, 0))
    store.retain(2, 1, "min")
    assert not elsewhere.exists()


def test_what_another_pod_of_this_host_writes_is_left(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Under hostNetwork pods share the name of the host and not its process ids."""
    with subprocess.Popen(["true"]) as ended:
        pass
    theirs = tmp_path / "namespace"
    theirs.symlink_to("pid:[1]")
    monkeypatch.setattr(store_module, "_LINUX", (store_module._LINUX[0], theirs))
    written = store._hidden("step-000002", "new")
    live = written.with_name(written.name.replace(f".{os.getpid()}.", f".{ended.pid}."))
    live.mkdir(parents=True)
    monkeypatch.undo()
    commit(store, 1, write, facts())
    store.retain(2, 1, "min")
    assert live.exists()
    os.utime(live, (0, 0))
    store.retain(2, 1, "min")
    assert not live.exists()


def store_token(hidden_path: Path) -> str:
    return hidden_path.name.split(".")[-2]


def big(folder: Path) -> None:
    save_file({"w": np.ones(1_000_000, np.float32)}, folder / "model.safetensors")


def big_bytes(folder: Path) -> None:
    (folder / "model.bin").write_bytes(bytes(4_000_000))


@pytest.mark.parametrize("writer", [big, big_bytes])
def test_a_file_that_cannot_grow_leaves_the_earlier_checkpoints(
    store: CheckpointStore, tmp_path: Path, writer: object
) -> None:
    assert callable(writer)
    commit(store, 1, write, facts())
    with file_size_limit(100_000):
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):  # the fault is real
            (tmp_path / "probe").write_bytes(bytes(200_000))
        with pytest.raises(
            CheckpointError, match=r"step-000002 could not be written: .*File too large"
        ):
            commit(store, 2, writer, facts())
    assert names(store) == ["step-000001"]
    assert hidden(store) == []
    commit(store, 2, writer, facts())
    assert newest(store) == store.root / "step-000002"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a 2 MB disk cannot be mounted without root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("writer", [big, big_bytes])
def test_a_full_disk_leaves_the_earlier_checkpoints(small_disk: Path, writer: object) -> None:
    assert callable(writer)
    store = CheckpointStore(small_disk / "checkpoints")
    first = commit(store, 1, write, facts())
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):  # the fault is real
        (small_disk / "probe").write_bytes(bytes(4_000_000))
    (small_disk / "probe").unlink()
    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left"):
        commit(store, 2, writer, facts())
    assert names(store) == ["step-000001"]
    assert hidden(store) == []
    store.verify(first)
    commit(store, 3, write, facts())
    assert newest(store) == store.root / "step-000003"


def test_a_root_that_is_a_file_raises(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        commit(CheckpointStore(tmp_path / "checkpoints"), 1, write, facts())


def test_retain_keeps_the_newest_the_best_and_the_protected(store: CheckpointStore) -> None:
    for step, loss in enumerate([0.9, 0.2, 0.5, 0.6, None, 0.7, 0.8], start=1):
        commit(store, step, write, facts(loss, accuracy=step % 4))
    assert store.retain(2, 1, "min", protect=["checkpoints/step-000001"]) == [
        step_name(step) for step in (3, 4, 5)
    ]
    assert names(store) == [step_name(step) for step in (1, 2, 6, 7)]
    # By another metric, where more is better: 7 (3.0), then 2 and 6 (2.0), of which 2 came first.
    assert store.retain(1, 2, "max", metric="eval_token_accuracy") == [step_name(1), step_name(6)]


def test_retain_on_random_histories_never_loses_what_it_must_keep(tmp_path: Path) -> None:
    draw = random.Random(0)
    for case in range(20):
        store = CheckpointStore(tmp_path / str(case))
        losses = {step: draw.choice([None, draw.random()]) for step in range(1, draw.randint(2, 9))}
        for step, loss in losses.items():
            commit(store, step, write, facts(loss))
        keep_last, keep_best = draw.randint(2, 4), draw.randint(1, 3)
        protect = {step_name(draw.choice(list(losses)))}
        ranked = sorted((loss, step) for step, loss in losses.items() if loss is not None)
        kept = {step_name(step) for step in list(losses)[-keep_last:]} | protect
        kept |= {step_name(step) for _, step in ranked[:keep_best]}
        deleted = store.retain(keep_last, keep_best, "min", protect)
        assert set(names(store)) == kept
        assert set(deleted) == {step_name(step) for step in losses} - kept


def test_damaged_checkpoints_do_not_count_as_kept(store: CheckpointStore) -> None:
    for step in (1, 2, 3, 4):
        commit(store, step, write, facts(1.0 * step))
    (store.root / "step-000004" / MANIFEST).unlink()
    (store.root / "step-000001" / "state/state.json").write_bytes(b"short")
    assert store.retain(1, 1, "min") == []
    assert names(store) == ["step-000002", "step-000003"]
    assert (store.root / "step-000004").exists()
    assert (store.root / "step-000001").exists()


def test_the_store_loads_no_torch() -> None:
    code = (
        "import sys, raytune_ft.checkpoints.store\n"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"
