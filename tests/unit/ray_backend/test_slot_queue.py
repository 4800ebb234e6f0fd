"""Trials and engines meet; no cluster: the actor's methods are called as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.errors import RunFailed
from raytune_ft.ray_backend.slot_queue import Enter, Finish, Leave, SlotBoard
from raytune_ft.train.spec import RunSpec

Story = Callable[[SlotBoard], Coroutine[Any, Any, None]]


def play(story: Story) -> None:
    asyncio.run(asyncio.wait_for(story(SlotBoard()), timeout=10))


def spec(run: str) -> RunSpec:
    return RunSpec(None, Path(run), Path("data"))  # type: ignore[arg-type]


async def enter(board: SlotBoard, *runs: str) -> None:
    for run in runs:
        assert await board.enter(run, spec(run))


def test_a_trial_waits_for_a_slot_and_takes_the_next_that_is_free() -> None:
    async def story(board: SlotBoard) -> None:
        waiting = asyncio.create_task(board.enter("a", spec("a")))
        await asyncio.sleep(0)
        assert not waiting.done()
        assert await board.begin("engine-0", 1) == []
        assert await waiting
        assert await board.commands("engine-0", 1) == [Enter(spec("a"))]
        second = asyncio.create_task(board.enter("b", spec("b")))
        await asyncio.sleep(0.01)
        assert not second.done()
        await board.gone("a")
        assert await second
        assert await board.commands("engine-0", 1) == [Enter(spec("b"))]
        assert await board.open_runs() == ["b"]

    play(story)


def test_trials_spread_over_engines() -> None:
    async def story(board: SlotBoard) -> None:
        await board.begin("one", 2)
        await board.begin("two", 2)
        await enter(board, "a", "b", "c", "d")
        for engine in ("one", "two"):
            assert len(await board.commands(engine, 1)) == 2

    play(story)


def test_a_trial_that_leaves_is_gone_when_its_engine_says_so() -> None:
    async def story(board: SlotBoard) -> None:
        await board.begin("one", 2)
        await enter(board, "a")
        assert not await board.leave("a", "pruned", timeout_s=0.01)
        leaving = asyncio.create_task(board.leave("a", "interrupted", timeout_s=5))
        await asyncio.sleep(0)
        await board.gone("a")
        assert await leaving
        asked = [Enter(spec("a")), Leave("a", "pruned"), Leave("a", "interrupted")]
        assert await board.commands("one", 1) == asked
        assert await board.leave("a", "pruned", timeout_s=0.01)
        assert await board.leave("stranger", "pruned", timeout_s=0.01)

    play(story)


def test_a_slot_is_free_when_a_busy_engine_has_let_its_trial_go() -> None:
    async def story(board: SlotBoard) -> None:
        await board.begin("one", 1)
        await enter(board, "a")
        assert not await board.leave("a", "pruned", timeout_s=0.01)
        waiting = asyncio.create_task(board.enter("b", spec("b")))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await board.gone("a")
        assert await waiting

    play(story)


def test_an_engine_that_starts_again_finds_its_trials() -> None:
    async def story(board: SlotBoard) -> None:
        assert await board.slots_of("one") is None
        await board.begin("one", 3)
        assert await board.slots_of("one") == 3
        await enter(board, "a", "b", "c")
        await board.gone("a")
        leaving = asyncio.create_task(board.leave("c", "pruned", timeout_s=5))
        await asyncio.sleep(0)
        assert await board.begin("one", 3) == [spec("b")]
        assert await leaving
        assert await board.commands("one", 0.01) == []

    play(story)


def test_messages_reach_their_trial_in_order() -> None:
    async def story(board: SlotBoard) -> None:
        await board.begin("one", 2)
        await enter(board, "a", "b")
        assert await board.take("a", 0.01) == ([], False)
        for number in range(2):
            await board.post("a", {"report": number})
        await board.post("stranger", {"report": 3})
        assert await board.take("a", 5) == ([{"report": 0}, {"report": 1}], False)
        assert await board.take("b", 0.01) == ([], False)

    play(story)


@pytest.mark.parametrize("others", [0, 1])
def test_trials_of_an_engine_that_ended_end_with_its_error(others: int) -> None:
    error = RunFailed("no memory")

    async def story(board: SlotBoard) -> None:
        for number in range(1 + others):
            await board.begin(f"engine-{number}", 1)
        await enter(board, "a")
        engine = "engine-0"
        await board.engine_ended(engine, error)
        assert await board.take("a", 5) == ([{"ended": error}], False)
        assert await board.open_runs() == []
        await enter(board, "b")
        events, _ = await board.take("b", 0.01)
        assert events == ([] if others else [{"ended": error}])

    play(story)


def test_everybody_stops() -> None:
    async def story(board: SlotBoard) -> None:
        await board.begin("one", 1)
        await enter(board, "a")
        waiting = asyncio.create_task(board.enter("b", spec("b")))
        listening = asyncio.create_task(board.take("a", 100))
        await asyncio.sleep(0.01)
        await board.stop_everybody()
        assert not await waiting
        assert await listening == ([], True)
        assert await board.is_stopping()

    play(story)


def test_a_trial_that_nobody_hears_gives_its_slot_back_and_gets_none() -> None:
    async def story(board: SlotBoard) -> None:
        await board.begin("one", 1)
        await enter(board, "a")
        giving_up = asyncio.create_task(board.give_up("a"))
        waiting = asyncio.create_task(board.enter("b", spec("b")))
        await asyncio.sleep(0.01)
        assert Leave("a", "pruned") in await board.commands("one", 1)
        await board.gone("a")
        await giving_up
        assert await waiting
        assert not await board.enter("a", spec("a"))

    play(story)


def test_an_engine_that_comes_late_is_told_to_finish() -> None:
    async def story(board: SlotBoard) -> None:
        await board.begin("one", 1)
        await board.finish()
        await board.begin("two", 1)
        for engine in ("one", "two"):
            assert await board.commands(engine, 1) == [Finish()]

    play(story)
