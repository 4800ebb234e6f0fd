"""Checkpoints and runs on a real S3-speaking server, through connections that break."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from raytune_ft.bucket import Bucket, Timing
from raytune_ft.checkpoints.manage import listed, verified
from raytune_ft.checkpoints.manifest import parse_manifest, write_manifest
from raytune_ft.checkpoints.mirror import Mirror, mirrored
from raytune_ft.checkpoints.s3 import RemoteCheckpoints
from raytune_ft.checkpoints.store import CheckpointFacts, CheckpointStore
from raytune_ft.errors import CheckpointError, ConfigError, StorageError
from tests.support import checkpoints
from tests.support.s3 import Proxy, s3_server

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = Timing(attempts=4, connect_s=2.0, read_s=1.0)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with s3_server() as address:
        yield address


@pytest.fixture
def proxy(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield proxy
    proxy.close()


@pytest.fixture
def bucket(proxy: Proxy, request: pytest.FixtureRequest) -> Bucket:
    return Bucket(f"s3://models/{abs(hash(request.node.name))}", QUICK)


def commit(root: Path, step: int, size: int = 200_000) -> Path:
    def write(folder: Path) -> None:
        (folder / "state").mkdir()
        (folder / "model.safetensors").write_bytes(bytes([step]) * size)
        (folder / "state" / "state.json").write_text(json.dumps({"step": step}))

    facts = CheckpointFacts(8 * step, "c", "lora", 1 / step)
    return checkpoints.commit(CheckpointStore(root), step, write, facts)


def make_run(run: Path, steps: tuple[int, ...] = (1, 2)) -> Path:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: some\n")
    for step in steps:
        commit(run / "checkpoints", step)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "mirror.json"
    }


def test_up_and_down_again(tmp_path: Path, bucket: Bucket) -> None:
    remote = RemoteCheckpoints(bucket, "run/checkpoints")
    folders = [commit(tmp_path / "here", step) for step in (1, 12)]
    for folder in folders:
        remote.upload(folder)
    assert remote.names() == ["step-000001", "step-000012"]
    assert remote.verify("step-000012").step == 12
    (tmp_path / "there").mkdir()
    remote.fetch("step-000012", tmp_path / "there")
    assert content(tmp_path / "there/step-000012") == content(folders[1])
    CheckpointStore(tmp_path / "there").verify(tmp_path / "there/step-000012")
    remote.delete("step-000001")
    assert remote.names() == ["step-000012"]
    assert not bucket.sizes("run/checkpoints/step-000001")
    with pytest.raises(CheckpointError, match="step-000001 is missing"):
        remote.fetch("step-000001", tmp_path / "there")


def test_connections_that_break_lose_nothing(tmp_path: Path, bucket: Bucket, proxy: Proxy) -> None:
    remote = RemoteCheckpoints(bucket, "run/checkpoints")
    folder = commit(tmp_path / "here", 3, 500_000)
    proxy.every = 13
    remote.upload(folder)
    remote.verify("step-000003")
    (tmp_path / "there").mkdir()
    remote.fetch("step-000003", tmp_path / "there")
    proxy.every, wanted = 3, {"fail", "reset", "cut", "stall", "lose"}
    for _ in range(40):  # how many pieces a connection comes in differs from run to run
        assert remote.names() == ["step-000003"]
        if wanted <= set(proxy.done):
            break
    assert wanted <= set(proxy.done)
    assert content(tmp_path / "there/step-000003") == content(folder)


def test_a_store_that_stays_away_is_given_up_and_nothing_is_committed(
    tmp_path: Path, bucket: Bucket, proxy: Proxy
) -> None:
    remote = RemoteCheckpoints(bucket, "run/checkpoints")
    folder = commit(tmp_path / "here", 4)
    sent: list[str] = []
    upload = bucket.upload

    def then_down(path: Path, key: str) -> None:
        upload(path, key)
        sent.append(key)
        proxy.down = True

    bucket.upload = then_down  # type: ignore[method-assign]
    started = time.monotonic()
    with pytest.raises(
        StorageError, match=r"cannot be reached \(\w+, up to 4 attempts\)"
    ) as caught:
        remote.upload(folder)
    assert time.monotonic() - started < 20
    assert "swordfish" not in str(caught.value)
    proxy.down = False
    assert len(sent) == 1
    assert bucket.sizes("run/")  # files without a manifest,
    assert remote.names() == []  # which is no checkpoint
    bucket.upload = upload  # type: ignore[method-assign]
    remote.clear(keep=[])
    assert not bucket.sizes("run/")
    remote.upload(folder)
    remote.verify("step-000004")


def test_damage_is_found_named_and_put_aside(
    tmp_path: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = RemoteCheckpoints(bucket, "run/checkpoints")
    for step in (1, 2):
        remote.upload(commit(tmp_path / "here", step))
    size = len((tmp_path / "here/step-000002/model.safetensors").read_bytes())
    bucket.put("run/checkpoints/step-000002/model.safetensors", bytes(size))
    with pytest.raises(CheckpointError, match=r"step-000002/model\.safetensors is damaged: sha256"):
        remote.verify("step-000002")
    told: list[str] = []
    rows = verified(bucket.url, told.append)
    assert [(row.name, bool(row.error)) for row in rows] == [
        ("step-000001", False),
        ("step-000002", True),
    ]
    assert "moved to s3://models/" in told[0]
    assert [row.name for row in listed(f"{bucket.url}/run")] == ["step-000001"]


def test_a_run_is_copied_and_goes_on_elsewhere(
    tmp_path: Path, bucket: Bucket, proxy: Proxy
) -> None:
    proxy.every = 13
    here = make_run(tmp_path / "here/some")
    with sqlite3.connect(here / "study.db") as study:
        study.execute("create table trial (value)")
        study.execute("insert into trial values (7)")
    told: list[str] = []
    mirror = Mirror(bucket, here, told.append)
    mirror.sync()
    commit(here / "checkpoints", 3)
    CheckpointStore(here / "checkpoints").retain(2, 1, "min")
    (here / "result.json").write_text('{"status": "interrupted"}')
    mirror.sync()
    names = RemoteCheckpoints(bucket, "some/checkpoints").names()
    assert names == ["step-000002", "step-000003"]
    there = tmp_path / "there/some"
    other = Mirror(bucket, there, told.append)
    with pytest.raises(StorageError, match="run some exists in s3://models"):
        other.begin(resume=False)
    other.begin(resume=True)
    before, after = content(here), content(there)
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if name != "study.db")
    with sqlite3.connect(there / "study.db") as study:
        assert study.execute("select value from trial").fetchall() == [(7,)]
    other.sync()
    with pytest.raises(StorageError, match="was taken over by another driver"):
        mirror.sync()
    commit(there / "checkpoints", 4)
    other.sync()
    again = Mirror(bucket, here, told.append)  # back on the first machine, whose copy is older
    again.begin(resume=True)
    assert (here / "checkpoints/step-000004").is_dir()
    assert (tmp_path / "here/some.older-1/checkpoints/step-000003").is_dir()
    same = Mirror(bucket, there, told.append)
    same.begin(resume=True)  # its copy is the newest: nothing is fetched
    assert not (tmp_path / "there/some.older-1").exists()


def test_the_background_copy_survives_an_outage(
    tmp_path: Path, bucket: Bucket, proxy: Proxy
) -> None:
    run, told = tmp_path / "here/some", list[str]()
    quick = Timing(attempts=2, connect_s=1.0, read_s=1.0)
    with mirrored(bucket.url, run, False, told.append, 0.05, quick):
        make_run(run)
        proxy.down = True
        deadline = time.monotonic() + 20
        while not told and time.monotonic() < deadline:
            time.sleep(0.05)
        commit(run / "checkpoints", 5)
        proxy.down = False
    assert "not copied for now" in told[0]
    assert RemoteCheckpoints(bucket, "some/checkpoints").names()[-1] == "step-000005"

    def go_on() -> None:
        with mirrored(bucket.url, run, True, told.append, 9, quick):
            (run / "metrics.jsonl").write_text("more\n")
            proxy.down = True

    with pytest.raises(StorageError, match="cannot be reached"):
        go_on()
    assert (run / "metrics.jsonl").read_text() == "more\n"  # what was not copied is kept
    assert not [t for t in threading.enumerate() if t.name == "mirror"]


def test_a_mistake_that_was_undone_leaves_nothing(tmp_path: Path, bucket: Bucket) -> None:
    run = tmp_path / "here/some"

    def begin() -> None:
        with mirrored(bucket.url, run, False, print, 0.05):
            make_run(run)
            deadline = time.monotonic() + 20
            while not bucket.sizes("some/metrics") and time.monotonic() < deadline:
                time.sleep(0.05)
            assert bucket.sizes()
            shutil.rmtree(run)
            raise ValueError("mistake")

    with pytest.raises(ValueError, match="mistake"):
        begin()
    assert not bucket.sizes()


def test_a_driver_killed_before_anything_was_measured_leaves_the_name_free(
    tmp_path: Path, bucket: Bucket
) -> None:
    here = tmp_path / "here/some"
    here.mkdir(parents=True)
    for name in ("config.yaml", "data.json"):
        (here / name).write_text("name: some\n")
    Mirror(bucket, here, print).sync()
    assert bucket.sizes("some/")
    there = tmp_path / "there/some"
    Mirror(bucket, there, print).begin(resume=True)  # either command goes on
    assert (there / "config.yaml").is_file()
    Mirror(bucket, tmp_path / "elsewhere/some", print).begin(resume=False)
    assert not bucket.sizes("some/")
    make_run(tmp_path / "elsewhere/some", steps=())
    Mirror(bucket, tmp_path / "elsewhere/some", print).sync()
    with pytest.raises(StorageError, match="exists in s3://models"):
        Mirror(bucket, here, print).begin(resume=False)


def test_a_copy_that_is_broken_off_has_metrics_up_to_its_checkpoints(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "here/some")
    mirror = Mirror(bucket, run, print)
    mirror.sync()
    (run / "metrics.jsonl").write_text('{"step": 3}\n')
    commit(run / "checkpoints", 3)

    def die(remote: RemoteCheckpoints, folder: Path) -> None:
        upload(remote, folder)
        if folder.name == "step-000003":
            raise KeyboardInterrupt

    upload = RemoteCheckpoints.upload
    monkeypatch.setattr(RemoteCheckpoints, "upload", die)
    with pytest.raises(KeyboardInterrupt):
        mirror.sync()
    assert RemoteCheckpoints(bucket, "some/checkpoints").names()[-1] == "step-000003"
    assert bucket.get("some/metrics.jsonl") == b'{"step": 3}\n'


def test_a_fetched_run_keeps_its_lock_and_is_whole_or_fetched_again(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    Mirror(bucket, make_run(tmp_path / "here/some"), print).sync()
    there = tmp_path / "there/some"
    there.mkdir(parents=True)
    (there / ".lock").touch()
    inode = (there / ".lock").stat().st_ino
    left = [3]

    def die(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return rename(path, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        Mirror(bucket, there, print).begin(resume=True)
    assert not (there / "mirror.json").exists()
    Mirror(bucket, there, print).begin(resume=True)
    assert content(there).keys() - {".lock"} == content(tmp_path / "here/some").keys()
    assert (there / ".lock").stat().st_ino == inode


@pytest.mark.parametrize("url", ["s3://", "s3://key:secret@bucket/x", "gs://bucket"])
def test_what_is_no_bucket(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the URL of a bucket") as caught:
        Bucket(url)
    assert "secret" not in str(caught.value)


def test_a_bucket_that_is_not_there(proxy: Proxy) -> None:
    with pytest.raises(StorageError, match=r"s3://other refuses \(NoSuchBucket\)"):
        Bucket("s3://other", QUICK).sizes()


def test_without_credentials(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(StorageError, match="without credentials; set AWS_ACCESS_KEY_ID"):
        Bucket("s3://models", QUICK).sizes()


@pytest.mark.parametrize(
    "key",
    [
        "../out",
        "../../../out",
        "trials/../../out",
        "/out",
        "trials//out",
        "./out",
        "a\\..\\out",
        "checkpoints/step-000001/../../../out",
        "../step-000001/manifest.json",
    ],
)
def test_a_key_that_leaves_the_run_is_refused(tmp_path: Path, bucket: Bucket, key: str) -> None:
    Mirror(bucket, make_run(tmp_path / "here/some"), print).sync()
    evil = f"some/{key}"
    bucket.put(evil, b"owned")
    assert evil in bucket.sizes("some/")  # the store keeps such a key as it is
    there = tmp_path / "a/b/c/some"
    with pytest.raises(StorageError, match=r"leads out of the run's directory; delete it"):
        Mirror(bucket, there, print).begin(resume=True)
    assert [path.name for path in tmp_path.rglob("*") if "out" in path.name] == []
    assert not there.parent.exists()  # nothing else was fetched either
    bucket.delete(evil)
    Mirror(bucket, there, print).begin(resume=True)
    assert content(there) == content(tmp_path / "here/some")


def test_a_folder_that_a_console_made_is_no_file(tmp_path: Path, bucket: Bucket) -> None:
    Mirror(bucket, make_run(tmp_path / "here/some"), print).sync()
    bucket.put("some/checkpoints/", b"")
    Mirror(bucket, tmp_path / "there/some", print).begin(resume=True)
    assert content(tmp_path / "there/some") == content(tmp_path / "here/some")


def test_a_manifest_that_lists_files_elsewhere_is_refused(tmp_path: Path, bucket: Bucket) -> None:
    remote = RemoteCheckpoints(bucket, "run/checkpoints")
    folder = commit(tmp_path / "here", 1)
    remote.upload(folder)
    manifest = parse_manifest((folder / "manifest.json").read_bytes(), "it")
    stolen = replace(manifest.files[0], path="../../../out")
    write_manifest(folder / "manifest.json", replace(manifest, files=(stolen,)))
    bucket.put("run/checkpoints/step-000001/manifest.json", (folder / "manifest.json").read_bytes())
    with pytest.raises(CheckpointError, match="is not a path below a folder"):
        remote.fetch("step-000001", tmp_path / "a/b/there")
    assert not (tmp_path / "out").exists()


def test_a_link_takes_no_file_of_elsewhere_into_the_bucket(tmp_path: Path, bucket: Bucket) -> None:
    (tmp_path / "credentials").write_text("swordfish")
    run = make_run(tmp_path / "here/some")
    (run / "notes.txt").symlink_to(tmp_path / "credentials")
    (run / "folder").symlink_to(tmp_path, target_is_directory=True)
    weights = run / "checkpoints/step-000001/model.safetensors"
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    told: list[str] = []
    Mirror(bucket, run, told.append).sync()
    held = bucket.sizes("some/")
    assert "some/metrics.jsonl" in held
    assert "some/checkpoints/step-000002/manifest.json" in held
    assert not [key for key in held if "step-000001" in key]
    assert told == ["step-000001 is not copied: 'model.safetensors' leads out of its folder"]
    assert not [key for key in held if "notes" in key or "folder" in key]
