"""Nodes that are waited for, and what is asked of an autoscaler; no cluster."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from ray.exceptions import RayError

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.errors import ClusterError
from raytune_ft.ray_backend import capacity
from raytune_ft.ray_backend.capacity import Demand, Steps, autoscaler_runs, await_capacity, looking

Asked = list[tuple[str, Any]]


class Coordinator:
    """Ray's actor, as far as it is called."""

    def __init__(self) -> None:
        self.asked: Asked = []
        self.labels: list[Any] = []

    def __getattr__(self, method: str) -> Any:
        call = type("Call", (), {})()

        def remote(name: str, bundles: Any = None, *more: Any, **named: Any) -> None:
            self.asked.append((method, bundles))
            self.labels.append(named.get("label_selectors"))

        call.remote = remote
        return call


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """An autoscaler runs; what it is asked for."""
    coordinator = Coordinator()
    monkeypatch.setattr(Demand, "_actor", lambda self: coordinator)
    monkeypatch.setattr(capacity.ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(capacity, "autoscaler_runs", lambda: True)
    return coordinator.asked


def two_workers(**more: Any) -> ParallelConfig:
    return ParallelConfig.model_validate({"workers": 2, "strategy": "ddp", **more})


def test_a_demand_is_renewed_and_withdrawn(asked: Asked) -> None:
    now = [0.0]
    demand = Demand(two_workers(), lambda: now[0])
    for now[0], groups in [(0, 2), (1, 2), (20, 2), (21, 1), (22, 0), (23, 0), (60, 0)]:
        demand.ask(groups)
    demand.withdraw()
    counts = [(method, bundles and len(bundles)) for method, bundles in asked]
    request, cancel = "request_resources", "cancel_request"
    assert counts == [(request, 4), (request, 4), (request, 2), (cancel, None)]
    assert asked[0][1][0] == {"CPU": 1.0}


def test_a_demand_names_the_nodes_that_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = Coordinator()
    monkeypatch.setattr(Demand, "_actor", lambda self: coordinator)
    Demand(two_workers(accelerator="H100", label_selector={"zone": "c"})).ask(1)
    assert coordinator.asked[0][1] == [{"CPU": 1.0, "accelerator_type:H100": 0.001}] * 2
    assert coordinator.labels == [[{"zone": "c"}] * 2]


def test_a_demand_that_brings_no_node_is_halved_until_nodes_come() -> None:
    now = [0.0]
    steps = Steps(lambda: now[0])
    found = []
    for now[0], fit in [(0, 1), (5, 1), (11, 1), (22, 1), (33, 1), (60, 1), (94, 1), (95, 2)]:
        found.append(steps.next(6 - fit, fit))
    assert found == [5, 5, 2, 1, 0, 0, 1, 4]


def test_nodes_are_asked_for_and_waited_for(asked: Asked) -> None:
    nodes: list[dict[str, float]] = []
    said: list[str] = []

    def come(seconds: float) -> None:
        nodes.append({"CPU": 1.0})

    found = await_capacity(
        two_workers(), said.append, Demand(two_workers()), lambda parallel: list(nodes), come
    )
    assert found == 1
    assert [method for method, _ in asked] == ["request_resources"]
    (line,) = said
    assert line.startswith("waiting up to 15 min for nodes: parallel.workers=2 ")
    assert "the cluster has 0 CPU on 0 nodes" in line


@pytest.mark.parametrize("written", [0.01, "0.01s"])
def test_nodes_that_do_not_come_are_refused(asked: Asked, written: float | str) -> None:
    parallel = two_workers(wait_for_nodes=written)
    wait = threading.Event().wait
    with pytest.raises(ClusterError) as raised:
        await_capacity(
            parallel, print, Demand(parallel), lambda parallel: [], lambda seconds: wait(0.01)
        )
    assert "the cluster has 0 CPU on 0 nodes, after 10 ms of waiting" in str(raised.value)
    assert "parallel.wait_for_nodes" in raised.value.remedy
    assert asked


def test_without_an_autoscaler_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "autoscaler_runs", lambda: False)
    parallel = two_workers()
    with pytest.raises(ClusterError) as raised:
        await_capacity(parallel, print, Demand(parallel), lambda parallel: [{"CPU": 1.0}])
    assert "waiting" not in str(raised.value)


def test_what_is_there_already_is_not_asked_for(asked: Asked) -> None:
    parallel = two_workers()
    assert await_capacity(parallel, print, Demand(parallel), lambda parallel: [{"CPU": 4.0}]) == 2
    assert asked == []


@pytest.mark.parametrize(
    ("types", "runs"),
    [
        ({"node_1a2b": 1, "node_3c4d": 1}, False),  # `ray start` by hand
        ({"ray.head.default": 1}, True),
        (None, False),
    ],
)
def test_an_autoscaler_has_node_types(
    monkeypatch: pytest.MonkeyPatch, types: dict[str, int] | None, runs: bool
) -> None:
    report = json.dumps({"autoscaler_report": types and {"active_nodes": types}})
    monkeypatch.setattr(capacity, "is_autoscaler_v2", lambda fetch_from_server: False)
    monkeypatch.setattr(capacity, "_internal_kv_get", lambda key: report)
    assert autoscaler_runs() is runs


def test_a_look_that_failed_is_made_again() -> None:
    again = threading.Event()
    calls: list[int] = []

    def look() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RayError
        if len(calls) == 4:
            again.set()

    with looking(look, every_s=0.01):
        assert len(calls) >= 1
        assert again.wait(10)
    seen = len(calls)
    threading.Event().wait(0.05)
    assert len(calls) == seen
