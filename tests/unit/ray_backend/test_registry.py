"""Who may hold workers, without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
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
