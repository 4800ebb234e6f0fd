"""Who may hold workers, without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ft.errors import RunFailed
from raytune_ft.ray_backend import worker_group as ray_group
from raytune_ft.ray_backend.registry import Group, Registry


async def soon(waiting: asyncio.Task[bool]) -> bool | None:
    """None while it still waits."""
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    return waiting.result() if done else None


def in_a_loop(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, timeout=10))


def test_a_slot_is_waited_for() -> None:
    async def test() -> None:
        registry = Registry(slots=1)
        assert await registry.open("run-a", "trial-a")
        second = asyncio.create_task(registry.open("run-b", "trial-b"))
        assert await soon(second) is None
        await registry.close("run-a")
        await registry.close("run-a")
        assert await soon(second) is True
        third = asyncio.create_task(registry.open("run-c", "trial-c"))
        assert await soon(third) is None  # closing twice makes no second slot
        assert await registry.open_runs() == ["run-b"]
        third.cancel()

    in_a_loop(test())


def test_whoever_waits_for_a_slot_can_be_stopped() -> None:
    async def test() -> None:
        registry = Registry(slots=1)
        assert await registry.open("run-a", "trial-a")
        waiting = asyncio.create_task(registry.open("run-b", "trial-b"))
        assert await soon(waiting) is None
        assert not await registry.is_stopping()
        await registry.stop_all()
        assert await registry.is_stopping()
        assert await soon(waiting) is False
        assert not await registry.open("run-c", "trial-c")

    in_a_loop(test())


def a_spec(name: str) -> Any:
    return SimpleNamespace(run_dir=Path(name))


def test_workers_train_what_they_are_assigned_one_after_the_other() -> None:
    async def test() -> None:
        registry = Registry(slots=1)
        assert await registry.open("run-a", "trial-a")
        assert await registry.assignment("run-a", 0, 0.01) is None
        assert await registry.assign("run-a", "trial-a", a_spec("a")) == 1
        first = await registry.assignment("run-a", 0, 1.0)
        assert first is not None
        assert (first.number, first.spec, first.over) == (1, a_spec("a"), False)
        assert await registry.busy_runs() == ["run-a"]
        assert await registry.passes_on("run-a", 1, "completed", rank=1)
        assert await registry.busy_runs() == ["run-a"]  # rank 0 has still to leave the result
        assert await registry.passes_on("run-a", 1, "completed", rank=0)
        again = await registry.assignment("run-a", 0, 1.0)  # of workers that started again
        assert again is not None
        assert again.over
        assert await registry.busy_runs() == []
        assert await registry.open_runs() == ["run-a"]
        next_one = asyncio.create_task(registry.assignment("run-a", 1, 5.0))
        await asyncio.sleep(0.01)
        assert await registry.assign("run-a", "trial-b", a_spec("b")) == 2
        second = await next_one
        assert second is not None
        assert (second.number, second.spec, second.over) == (2, a_spec("b"), False)
        assert await registry.give_up("trial-a") == []
        assert await registry.give_up("trial-b") == ["run-a"]

    in_a_loop(test())


@pytest.mark.parametrize(
    ("status", "prune", "passes_on"),
    [
        ("completed", False, True),
        ("early_stopped", False, True),
        ("interrupted", True, True),
        ("interrupted", False, False),  # a drained node: the workers start again
        ("failed", False, False),
        ("failed", True, False),
    ],
)
def test_only_a_run_without_a_fault_leaves_its_workers_to_the_next(
    status: str, prune: bool, passes_on: bool
) -> None:
    async def test() -> None:
        registry = Registry(slots=1)
        await registry.open("run-a", "trial-a")
        number = await registry.assign("run-a", "trial-a", a_spec("a"))
        assert number == 1
        if prune:
            await registry.prune("run-a")
        assert await registry.passes_on("run-a", number, status, rank=0) is passes_on

    in_a_loop(test())


@pytest.mark.parametrize("end", ["resize", "stop_all", "give_up", "close"])
def test_workers_are_not_passed_on_where_they_have_to_end(end: str) -> None:
    async def test() -> None:
        registry = Registry(slots=2)
        for name in "ab":
            await registry.open(f"run-{name}", f"trial-{name}")
            await registry.assign(f"run-{name}", f"trial-{name}", a_spec(name))
        await registry.passes_on("run-a", 1, "completed", rank=0)
        if end == "resize":
            await registry.resize(1)
        elif end == "stop_all":
            await registry.stop_all()
        elif end == "give_up":
            assert await registry.give_up("trial-c") == ["run-a"]  # it may have had those workers
        else:
            await registry.close("run-a")
        assert await registry.assign("run-a", "trial-c", a_spec("c")) is None

    in_a_loop(test())


def test_a_dead_owner_keeps_no_slot_and_waits_for_none() -> None:
    async def test() -> None:
        registry = Registry(slots=1)
        assert await registry.open("run-a", "dead")
        late = asyncio.create_task(registry.open("run-b", "dead"))
        other = asyncio.create_task(registry.open("run-c", "alive"))
        assert await soon(late) is None
        assert await registry.give_up("dead") == ["run-a"]
        assert await soon(late) is False
        await registry.close("run-a")
        assert await soon(other) is True
        # A controller that was still starting is remembered, for the end, and frees nothing.
        await registry.register("run-a", "controller", None, [])
        assert await registry.open_runs() == ["run-c", "run-a"]
        await registry.close("run-a")
        fourth = asyncio.create_task(registry.open("run-d", "alive"))
        assert await soon(fourth) is None
        fourth.cancel()

    in_a_loop(test())


def test_a_group_that_does_not_go_keeps_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def stay(group: Group) -> None:
        raise RunFailed("a placement group was not given back")

    monkeypatch.setattr(ray_group, "ray", SimpleNamespace(get=lambda value: value))
    registry = SimpleNamespace(
        group=SimpleNamespace(remote=lambda run: Group()),
        close=SimpleNamespace(remote=closed.append),
    )
    with pytest.raises(RunFailed, match="not given back"):
        ray_group.end_group("run-a", registry, wait=stay)
    assert closed == ["run-a"]


def test_slots_follow_the_room_of_the_cluster() -> None:
    async def test() -> None:
        registry = Registry(slots=0)
        waiting = [asyncio.create_task(registry.open(f"run-{n}", f"trial-{n}")) for n in range(3)]
        assert await soon(waiting[0]) is None
        await registry.resize(2)
        assert [await soon(each) for each in waiting] == [True, True, None]
        await registry.resize(1)
        await registry.close("run-0")
        assert await soon(waiting[2]) is None  # the other one holds the slot that is left
        await registry.close("run-1")
        assert await soon(waiting[2]) is True

    in_a_loop(test())
