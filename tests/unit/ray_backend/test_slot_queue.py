"""Trials and engines meet; no cluster: the actor's methods are called as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.errors import RunFailed
from raytune_ft.ray_backend.slot_queue import Enter, Finish, Leave, SlotQueue
from raytune_ft.rundir import RunSpec

Story = Callable[[SlotQueue], Coroutine[Any, Any, None]]


def play(story: Story) -> None:
    asyncio.run(asyncio.wait_for(story(SlotQueue()), timeout=10))


def spec(run: str) -> RunSpec:
    return RunSpec(None, Path(run), Path("data"))  # type: ignore[arg-type]


async def enter(queue: SlotQueue, *runs: str) -> None:
    for run in runs:
        assert await queue.enter(run, spec(run))


def test_a_trial_waits_for_a_slot_and_takes_the_next_that_is_free() -> None:
    async def story(queue: SlotQueue) -> None:
        waiting = asyncio.create_task(queue.enter("a", spec("a")))
        await asyncio.sleep(0)
        assert not waiting.done()
        assert await queue.begin("engine-0", 1) == []
        assert await waiting
        assert await queue.commands("engine-0", 1) == [Enter(spec("a"))]
        second = asyncio.create_task(queue.enter("b", spec("b")))
        await asyncio.sleep(0.01)
        assert not second.done()
        await queue.gone("a")
        assert await second
        assert await queue.commands("engine-0", 1) == [Enter(spec("b"))]
        assert await queue.open_runs() == ["b"]

    play(story)


def test_trials_spread_over_engines() -> None:
    async def story(queue: SlotQueue) -> None:
        await queue.begin("one", 2)
        await queue.begin("two", 2)
        await enter(queue, "a", "b", "c", "d")
        for engine in ("one", "two"):
            assert len(await queue.commands(engine, 1)) == 2

    play(story)


def test_a_trial_that_leaves_is_gone_when_its_engine_says_so() -> None:
    async def story(queue: SlotQueue) -> None:
        await queue.begin("one", 2)
        await enter(queue, "a")
        assert not await queue.leave("a", "pruned", timeout_s=0.01)
        leaving = asyncio.create_task(queue.leave("a", "interrupted", timeout_s=5))
        await asyncio.sleep(0)
        await queue.gone("a")
        assert await leaving
        asked = [Enter(spec("a")), Leave("a", "pruned"), Leave("a", "interrupted")]
        assert await queue.commands("one", 1) == asked
        assert await queue.leave("a", "pruned", timeout_s=0.01)
        assert await queue.leave("stranger", "pruned", timeout_s=0.01)

    play(story)


def test_a_slot_is_free_when_a_busy_engine_has_let_its_trial_go() -> None:
    async def story(queue: SlotQueue) -> None:
        await queue.begin("one", 1)
        await enter(queue, "a")
        assert not await queue.leave("a", "pruned", timeout_s=0.01)
        waiting = asyncio.create_task(queue.enter("b", spec("b")))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await queue.gone("a")
        assert await waiting

    play(story)


def test_an_engine_that_starts_again_finds_its_trials() -> None:
    async def story(queue: SlotQueue) -> None:
        assert await queue.slots_of("one") is None
        await queue.begin("one", 3)
        assert await queue.slots_of("one") == 3
        await enter(queue, "a", "b", "c")
        await queue.gone("a")
        leaving = asyncio.create_task(queue.leave("c", "pruned", timeout_s=5))
        await asyncio.sleep(0)
        assert await queue.begin("one", 3) == [spec("b")]
        assert await leaving
        assert await queue.commands("one", 0.01) == []

    play(story)


def test_an_engine_that_comes_back_with_fewer_slots_gives_trials_back() -> None:
    async def story(queue: SlotQueue) -> None:
        await queue.begin("one", 3)
        await enter(queue, "a", "b", "c")
        assert await queue.begin("one", 1) == [spec("a")]
        assert await queue.slots_of("one") == 1
        await queue.begin("two", 1)
        await asyncio.sleep(0.01)
        assert await queue.commands("two", 0.01) == [Enter(spec("b"))]
        assert await queue.open_runs() == ["a", "b", "c"]
        await queue.gone("a")
        await asyncio.sleep(0.01)
        assert (await queue.commands("one", 0.01))[-1] == Enter(spec("c"))

    play(story)


def test_messages_reach_their_trial_in_order() -> None:
    async def story(queue: SlotQueue) -> None:
        await queue.begin("one", 2)
        await enter(queue, "a", "b")
        assert await queue.take("a", 0.01) == ([], False)
        for number in range(2):
            await queue.post("a", {"report": number})
        await queue.post("stranger", {"report": 3})
        assert await queue.take("a", 5) == ([{"report": 0}, {"report": 1}], False)
        assert await queue.take("b", 0.01) == ([], False)

    play(story)


@pytest.mark.parametrize("others", [0, 1])
def test_trials_of_an_engine_that_ended_end_with_its_error(others: int) -> None:
    error = RunFailed("no memory")

    async def story(queue: SlotQueue) -> None:
        for number in range(1 + others):
            await queue.begin(f"engine-{number}", 1)
        await enter(queue, "a")
        engine = "engine-0"
        await queue.engine_ended(engine, error)
        assert await queue.take("a", 5) == ([{"ended": error}], False)
        assert await queue.open_runs() == []
        await enter(queue, "b")
        events, _ = await queue.take("b", 0.01)
        assert events == ([] if others else [{"ended": error}])

    play(story)


def test_everybody_stops() -> None:
    async def story(queue: SlotQueue) -> None:
        await queue.begin("one", 1)
        await enter(queue, "a")
        waiting = asyncio.create_task(queue.enter("b", spec("b")))
        listening = asyncio.create_task(queue.take("a", 100))
        await asyncio.sleep(0.01)
        await queue.stop_all()
        assert not await waiting
        assert await listening == ([], True)
        assert await queue.is_stopping()

    play(story)


def test_a_trial_that_nobody_hears_gives_its_slot_back_and_gets_none() -> None:
    async def story(queue: SlotQueue) -> None:
        await queue.begin("one", 1)
        await enter(queue, "a")
        giving_up = asyncio.create_task(queue.give_up("a"))
        waiting = asyncio.create_task(queue.enter("b", spec("b")))
        await asyncio.sleep(0.01)
        assert Leave("a", "pruned") in await queue.commands("one", 1)
        await queue.gone("a")
        await giving_up
        assert await waiting
        assert not await queue.enter("a", spec("a"))

    play(story)


def test_an_engine_that_comes_late_is_told_to_finish() -> None:
    async def story(queue: SlotQueue) -> None:
        await queue.begin("one", 1)
        await queue.finish()
        await queue.begin("two", 1)
        for engine in ("one", "two"):
            assert await queue.commands(engine, 1) == [Finish()]

    play(story)


def test_idle_engines_end_and_take_no_more_trials() -> None:
    async def story(queue: SlotQueue) -> None:
        for engine in ("one", "two", "three"):
            await queue.begin(engine, 2)
        await enter(queue, "a")
        assert await queue.retire_idle(1) == ["two"]
        assert await queue.retire_idle(5) == ["three"]
        assert await queue.commands("two", 1) == [Finish()]
        await enter(queue, "b")
        assert len(await queue.commands("one", 1)) == 2
        await queue.engine_ended("two", None)
        waiting = asyncio.create_task(queue.enter("c", spec("c")))
        await asyncio.sleep(0.01)
        assert not waiting.done()  # there is an engine left, so that this is no failure
        waiting.cancel()

    play(story)


def test_trials_of_a_retired_engine_go_on_in_others() -> None:
    async def story(queue: SlotQueue) -> None:
        await queue.begin("one", 2)
        await enter(queue, "a", "b")
        await queue.retire("one")
        await asyncio.sleep(0.01)
        assert await queue.open_runs() == ["a", "b"]
        await queue.begin("two", 1)
        await asyncio.sleep(0.01)
        assert await queue.commands("two", 1) == [Enter(spec("a"))]
        assert await queue.leave("b", "pruned", timeout_s=0.01)  # while it waits
        await queue.gone("a")
        await asyncio.sleep(0.01)
        assert await queue.open_runs() == []
        assert await queue.begin("one", 2) == []  # it was not dead after all
        assert await queue.commands("one", 1) == [Finish()]

    play(story)


def test_a_trial_that_leaves_a_retired_engine_is_gone() -> None:
    async def story(queue: SlotQueue) -> None:
        await queue.begin("one", 1)
        await enter(queue, "a")
        leaving = asyncio.create_task(queue.leave("a", "pruned", timeout_s=5))
        await asyncio.sleep(0)
        await queue.retire("one")
        assert await asyncio.wait_for(leaving, 1)
        await queue.begin("two", 1)
        assert await queue.commands("two", 0.01) == []

    play(story)


def test_a_trial_without_an_engine_ends_with_the_failure_of_the_last_one() -> None:
    async def story(queue: SlotQueue) -> None:
        await queue.begin("one", 1)
        await queue.begin("two", 1)
        await enter(queue, "a", "b")
        await queue.retire("one")
        error = RunFailed("lost")
        await queue.engine_ended("two", error)
        await asyncio.sleep(0.01)
        for run in "ab":
            assert await queue.take(run, 1) == ([{"ended": error}], False)
        assert await queue.open_runs() == []

    play(story)
