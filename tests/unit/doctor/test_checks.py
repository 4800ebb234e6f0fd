"""What each check makes of planted answers. tests/multihost/test_doctor.py plants the causes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from raytune_ft.bucket import Bucket
from raytune_ft.config.load import load_config
from raytune_ft.doctor import cluster, machine, network, probes, storage
from raytune_ft.doctor.checks import CHECKS
from raytune_ft.doctor.examine import Here
from raytune_ft.doctor.findings import NO_ANSWER, Finding, Row
from raytune_ft.doctor.machine import GIB
from raytune_ft.doctor.subject import Subject
from raytune_ft.errors import StorageError
from tests.support.s3 import s3_server

A, B, C = "10.0.0.1 (a)", "10.0.0.2 (b)", "10.0.0.3 (c)"
VERSIONS = {"Python": "3.11.7", "ray": "2.60.1", "torch": "2.13.0", "CUDA of torch": "13.0"}
NEEDED = [Requirement("ray[default]>=2.60,<2.61"), Requirement("torch>=2.13")]


def shown(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Status and node of each row."""
    return [(row.status, row.node) for row in rows]


def test_versions() -> None:
    equal = {A: VERSIONS, B: VERSIONS, C: VERSIONS}
    assert shown(machine.judge_versions(equal, NEEDED)) == [("ok", "all")]
    for package, version in (("torch", "2.12.0"), ("Python", "3.12.1"), ("CUDA of torch", "none")):
        rows = machine.judge_versions(equal | {B: VERSIONS | {package: version}}, ())
        assert shown(rows) == [("defect", B)]
        assert all(word in rows[0].found for word in (package, version, VERSIONS[package]))
        assert "constraints.txt" in rows[0].remedy
    later = VERSIONS | {"ray": "2.61.0"}
    rows = machine.judge_versions({A: later, B: later}, NEEDED)
    assert shown(rows) == [("defect", A), ("defect", B)]
    assert "<2.61" in rows[0].found
    rows = machine.judge_versions({A: VERSIONS | {"torch": "absent"}}, NEEDED)
    assert shown(rows) == [("defect", A)]


def gpus(count: int, driver: str = "590.1", usable: int | None = None) -> dict[str, Any]:
    return {
        "listed": [["NVIDIA H100", driver]] * count,
        "usable": count if usable is None else usable,
    }


@pytest.mark.parametrize(
    ("facts", "known", "expected"),
    [
        ({A: gpus(8), B: gpus(8)}, {A: 8.0, B: 8.0}, [("ok", "all")]),
        ({A: {"listed": None, "usable": None}}, {A: 0.0}, [("ok", "all")]),
        ({A: gpus(8)}, {A: None}, [("ok", "all")]),
        ({A: gpus(7), B: gpus(8)}, {A: 8.0, B: 8.0}, [("defect", A)]),
        ({A: gpus(8)}, {A: 4.0}, [("warning", A)]),
        ({A: gpus(2, usable=0)}, {A: 2.0}, [("defect", A)]),
        ({A: {"listed": None, "usable": 0}}, {A: 2.0}, [("defect", A)]),
        ({A: {"listed": None, "usable": 2}}, {A: 2.0}, [("ok", "all")]),
        ({A: gpus(1), B: gpus(1), C: gpus(1, "535.0")}, {A: 1, B: 1, C: 1}, [("warning", C)]),
    ],
)
def test_gpus(facts: Any, known: Any, expected: list[tuple[str, str]]) -> None:
    assert shown(machine.judge_gpus(facts, known)) == expected


def test_rays() -> None:
    one = {"clusters": {"10.0.0.1:6379": {"CPU": 8.0, "GPU": 0.0}}, "has": {"CPU": 8.0, "GPU": 0.0}}
    assert shown(cluster.judge_rays({A: one})) == [("ok", "all")]
    second = one["clusters"] | {"10.0.0.1:7000": {"CPU": 1.0, "GPU": 0.0}}
    rows = cluster.judge_rays({A: one, B: one | {"clusters": second}})
    assert shown(rows) == [("defect", B)]
    assert "9 CPUs of 8" in rows[0].found
    assert "10.0.0.1:7000" in rows[0].found
    shared = {name: {"CPU": 4.0, "GPU": 0.0} for name in second}
    assert shown(cluster.judge_rays({B: one | {"clusters": shared}})) == [("warning", B)]


@pytest.mark.parametrize(
    ("ahead", "trip", "status"),
    [
        (0.2, 0.1, "ok"),
        (1.5, 0.1, "warning"),
        (-1.5, 0.1, "warning"),
        (1.5, 2.0, "ok"),  # the question took long enough to explain it
        (29.9, 0.0, "warning"),
        (30.1, 0.0, "defect"),
        (-45.0, 0.1, "defect"),
    ],
)
def test_clocks(ahead: float, trip: float, status: str) -> None:
    rows = machine.judge_clocks({A: (0.0, 0.001), B: (ahead, trip)})
    assert [row.status for row in rows] == [status]
    if status != "ok":
        assert rows[0].node == B
        assert ("ahead of" if ahead > 0 else "behind") in rows[0].found


def test_disk_and_shared_memory() -> None:
    much = {"storage": ("/mnt/runs", 900 * GIB), "temporary files": ("/tmp", 20 * GIB)}
    rows = machine.judge_disk({A: much, B: much})
    assert shown(rows) == [("ok", "all")]
    assert "20.0 GiB" in rows[0].found
    little = much | {"temporary files": ("/tmp", 5 * GIB), "storage": ("/mnt/runs", GIB // 2)}
    rows = machine.judge_disk({A: much, B: little})
    assert shown(rows) == [("defect", B), ("warning", B)]
    assert "/mnt/runs" in rows[0].found
    assert shown(machine.judge_shm({A: 8 * GIB, B: 2 * GIB}, [])) == [("ok", "all")]
    small = machine.judge_shm({A: 8 * GIB, B: 64 * 2**20, C: None}, [B])
    assert shown(small) == [("defect", B), ("warning", C)]


def test_storage() -> None:
    fine = {A: None, B: None}
    assert shown(storage.judge_storage("/mnt", fine, {A: [], B: []})) == [("ok", "all")]
    refused = {A: None, B: PermissionError(13, "Permission denied")}
    rows = list(storage.judge_storage("/mnt", refused, {A: [], B: []}))
    assert shown(rows) == [("defect", B)]
    assert "Permission denied" in rows[0].found
    rows = list(storage.judge_storage("/mnt", fine, {A: [], B: [A]}))
    assert shown(rows) == [("defect", B)]
    assert A in rows[0].found
    hanging = {A: None, B: TimeoutError("no answer within 30 s")}  # of a dead file server
    assert shown(storage.judge_storage("/mnt", hanging, {A: []})) == [("defect", B)]
    died = {A: None, B: RuntimeError("the process died")}
    assert shown(storage.judge_storage("/mnt", died, {A: []})) == [("unknown", B)]


def test_locks() -> None:
    assert shown(storage.judge_locks("/mnt", {A: None}, {B: False})) == [("ok", "all")]
    rows = list(storage.judge_locks("/mnt", {A: None}, {B: False, C: True}))
    assert shown(rows) == [("defect", C)]
    assert A in rows[0].found
    without = StorageError("/mnt", "is on a file system without locks", "mount it with locks")
    assert shown(storage.judge_locks("/mnt", {A: without}, {B: False})) == [("defect", A)]
    assert shown(storage.judge_locks("/mnt", {A: None}, {B: OSError("x")})) == [("unknown", B)]


def test_ports() -> None:
    assert shown(network.judge_ports({A: {}, B: {}})) == [("ok", "all")]
    rows = network.judge_ports({A: {}, B: {A: "timed out", C: "timed out"}, C: {B: "refused"}})
    assert shown(rows) == [("defect", B), ("defect", C)]
    assert f"{A}, {C}: timed out" in rows[0].found


def test_auth() -> None:
    for is_open, beyond, insecure, status in (
        (False, True, False, "ok"),
        (True, False, False, "ok"),
        (True, True, False, "defect"),
        (True, True, True, "warning"),
    ):
        assert cluster.judge_auth("h:6379", is_open, beyond, insecure).status == status
    assert shown(cluster.judge_tokens({A: 0o600, B: 0o644, C: None})) == [("warning", B)]


def reduced(speeds: dict[tuple[str, str], float], took_s: float = 0.1) -> dict[str, Any]:
    """Answers of three nodes, of which each pair has that many GB/s."""
    names = [A, B, C]
    both = speeds | {(b, a): own for (a, b), own in speeds.items()}
    return {
        name: {
            "bytes": 64 * 2**20,
            "seconds": took_s,
            "pairs": {names.index(b): own for (a, b), own in both.items() if a == name},
        }
        for name in names
    }


def test_all_reduce() -> None:
    even = {(A, B): 1.0, (A, C): 0.9, (B, C): 1.1}
    rows = network.judge_all_reduce(reduced(even), "gloo")
    assert shown(rows) == [("ok", "all")]
    assert "0.895 GB/s" in rows[0].found  # 4/3 of 64 MiB in 0.1 s
    assert f"slowest pair: {A} and {C}" in rows[0].found
    rows = network.judge_all_reduce(reduced(even | {(A, C): 0.1, (B, C): 0.1}), "nccl")
    assert shown(rows) == [("ok", "all"), ("defect", C)]
    rows = network.judge_all_reduce(reduced(even | {(A, C): 0.4, (B, C): 0.4}), "nccl")
    assert shown(rows) == [("ok", "all"), ("warning", C)]
    rows = network.judge_all_reduce(reduced(even | {(A, C): 0.1}), "gloo")
    assert shown(rows) == [("ok", "all"), ("warning", A)]
    assert C in rows[1].found
    rows = network.judge_all_reduce(reduced(even, took_s=10), "gloo")
    assert shown(rows) == [("ok", "all"), ("warning", "all")]
    rows = network.judge_all_reduce(reduced(even) | {B: RuntimeError("refused")}, "gloo")
    assert shown(rows) == [("defect", B)]
    assert "GLOO_SOCKET_IFNAME" in rows[0].remedy


@dataclass
class Sites:
    """Nodes that answer with values, or with errors."""

    answers: dict[str, Any]

    def __post_init__(self) -> None:
        self.nodes: dict[str, Any] = dict.fromkeys(self.answers)
        self.lost: dict[str, Exception] = {}

    def ask(self, function: Any, arguments: Any, limit_s: float) -> dict[str, Any]:
        return self.answers

    def gcs_addresses(self) -> list[str]:
        return []

    def end(self) -> None: ...


def test_a_node_that_does_not_answer_is_unknown_and_the_others_are_judged() -> None:
    silent = TimeoutError("no answer within 30 s")
    rows = machine.shm(Subject(Sites({A: 8 * GIB, B: silent, C: 2**20})))
    assert shown(rows) == [("warning", C), ("unknown", B)]
    assert "no answer within 30 s" in rows[1].found


def test_a_node_without_a_process_is_a_defect() -> None:
    site = Sites({A: None})
    site.lost = {B: RuntimeError("Version mismatch: Ray 2.59.0")}
    rows = list(cluster.nodes(Subject(site)))
    assert shown(rows) == [("defect", B), ("ok", A)]
    assert "Version mismatch" in rows[0].found


def config_of(folder: Path, storage: str, **more: str) -> Any:
    file = folder / "run.yaml"
    file.write_text(
        f"name: x\nstorage: {storage}\ndata: {{train: {{path: rows.jsonl}}}}\n"
        + "".join(f"{key}: {value}\n" for key, value in more.items())
    )
    return load_config(file)


def test_storage_of_this_machine_is_left_as_it_was(tmp_path: Path) -> None:
    subject = Subject(Here(), config_of(tmp_path, f"{tmp_path}/new/runs"))
    with subject.undo:
        for check in ("storage", "locks", "disk"):
            assert shown(CHECKS[check].run(subject)) == [("ok", "all")], check
        subject.site.end()
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_storage_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    subject = Subject(Here(), config_of(tmp_path, f"{tmp_path}/taken"))
    assert [row.status for row in CHECKS["storage"].run(subject)] == ["defect"]
    assert [row.status for row in CHECKS["locks"].run(subject)] == ["unknown"]


def test_a_storage_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)
    subject = Subject(Here(), config_of(tmp_path, str(tmp_path)))
    with subject.undo:
        rows = list(CHECKS["locks"].run(subject))
    assert [row.status for row in rows] == ["defect"]
    assert "two processes can hold one" in rows[0].found


def test_variables_that_are_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, str(tmp_path), model='{path: "${WHERE_MODELS_ARE}/one"}')
    rows = list(CHECKS["environment"].run(Subject(Here(), config)))
    assert [row.status for row in rows] == ["defect"]
    assert "WHERE_MODELS_ARE" in rows[0].found
    monkeypatch.setenv("WHERE_MODELS_ARE", "/secret/place")
    rows = list(CHECKS["environment"].run(Subject(Here(), config)))
    assert [row.status for row in rows] == ["ok"]
    assert "secret" not in rows[0].found


@pytest.mark.filterwarnings("ignore")
def test_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moto")
    monkeypatch.setenv("RAYTUNE_FT_STORAGE", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server() as (host, port):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        subject = Subject(Here(), config_of(tmp_path, "s3://models/runs"))
        with subject.undo:
            rows = list(CHECKS["storage"].run(subject))
        assert [row.status for row in rows] == ["ok", "ok"]
        assert Bucket("s3://models").sizes("runs/") == {}
        subject = Subject(Here(), config_of(tmp_path, "s3://of-nobody/runs"))
        with subject.undo:
            rows = list(CHECKS["storage"].run(subject))
    assert [row.status for row in rows] == ["defect", "ok"]
    assert "of-nobody" in rows[0].found
    assert "swordfish" not in str(rows)


def test_every_finding_belongs_to_a_check() -> None:
    """So that docs/doctor.md has all of them."""
    entries = {id(finding) for check in CHECKS.values() for finding in check.findings}
    every = {
        id(each)
        for module in (cluster, machine, network, storage)
        for each in vars(module).values()
        if isinstance(each, Finding)
    }
    assert every - entries == {id(NO_ANSWER)}
    assert all(f.remedy and f.says for check in CHECKS.values() for f in check.findings)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_each_rank_meets_each_other_one_at_the_same_time(size: int) -> None:
    """By size of the group; one that waits for nobody is left out of a round."""
    met = [list(probes._peers(rank, size)) for rank in range(size)]
    assert all(sorted(peers) == [p for p in range(size) if p != r] for r, peers in enumerate(met))
    rounds: list[dict[int, int]] = []
    waiting = [list(peers) for peers in met]
    while any(waiting):
        pairs = {
            rank: peers[0]
            for rank, peers in enumerate(waiting)
            if peers and waiting[peers[0]][:1] == [rank]
        }
        assert pairs, "the ranks wait for each other for ever"
        rounds.append(pairs)
        for rank in pairs:
            waiting[rank].pop(0)
    assert len(rounds) <= size
