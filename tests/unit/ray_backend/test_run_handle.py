"""How a run on Ray is listened to and ended; no cluster."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ft.errors import Interrupted
from raytune_ft.ray_backend.registry import Ended, Note
from raytune_ft.ray_backend.run_handle import GroupHandle, run_to_end
from raytune_ft.rundir import RunSpec
from raytune_ft.train.result import load_result
from raytune_ft.train.watchdog import Standing
from tests.support.runs import make_config


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    config = make_config(tmp_path, tmp_path / "rows.jsonl")
    (tmp_path / "run").mkdir()
    return RunSpec(config, tmp_path / "run", tmp_path / "data", "eval_loss", "min")


class Group:
    """A worker group that trains until `released`, and then fails; and its registry."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.answers: tuple[list[Any], int] = ([], 2)
        self.asked = 0
        self.events: list[dict[str, Any]] = []

    def __getattr__(self, method: str) -> Any:
        replies = {
            "open": True,
            "group": SimpleNamespace(workers=["a", "b"], controller="c"),
            "end": SimpleNamespace(workers=["a", "b"]),
        }
        if method not in replies:
            raise AttributeError(method)
        return SimpleNamespace(remote=lambda *arguments: replies[method])

    @property
    def take(self) -> Any:
        return SimpleNamespace(remote=lambda run, timeout_s: ([self.events.pop(0)], False))

    @property
    def post(self) -> Any:
        return SimpleNamespace(remote=lambda run, event: self.events.append(event))

    def train(self, *arguments: object) -> None:
        self.released.wait(timeout=60)
        raise RuntimeError("something else")

    def ask(self, workers: list[Any], question: object) -> tuple[list[Any], int]:
        assert workers == ["a", "b"]
        self.asked += 1
        if self.asked == 2:
            self.released.set()
        return self.answers


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group()
    yield group
    group.released.set()


@pytest.fixture
def handle(spec: RunSpec, group: Group, monkeypatch: pytest.MonkeyPatch) -> GroupHandle:
    monkeypatch.setattr("ray.get", lambda answer: answer)
    end = lambda run, registry: group.released.set()  # noqa: E731
    handle = GroupHandle(spec, group, lambda payload: "", train=group.train, ask=group.ask, end=end)
    handle.start()
    return handle


@pytest.mark.parametrize(
    ("answers", "waits"),
    [(([False, False], 0), False), (([False], 0), False), (([], 1), True), (([True], 0), True)],
)
def test_only_workers_that_have_nothing_to_save_are_not_waited_for(
    answers: tuple[list[bool], int], waits: bool, handle: GroupHandle, group: Group
) -> None:
    group.answers = answers
    handle.wind_down(1000)
    assert group.asked == (2 if waits else 1)
    assert group.released.is_set() is waits


@pytest.mark.parametrize("awake", [1, 2])
def test_a_hang_is_forgotten_when_all_that_hung_are_awake(
    awake: int, handle: GroupHandle, group: Group
) -> None:
    hangs = [{"hang": Standing(rank, 1, "step 1", 0, 1, 9.0, 9.0, "")} for rank in range(2)]
    group.events += [*hangs, *({"awake": rank} for rank in range(awake))]
    assert isinstance(handle.next(), Note)
    for _ in range(1 + awake):
        assert handle.next() is None
    group.released.set()
    while not group.events:
        time.sleep(0.01)
    ended = handle.next()
    assert isinstance(ended, Ended)
    assert ("something else" if awake == 2 else "no progress") in str(ended.error)


@pytest.mark.parametrize("when", ["next", "wind_down", "stop"])
def test_a_second_signal_leaves_a_result_too(when: str, spec: RunSpec) -> None:
    def kill(*arguments: object, **names: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    def twice(*arguments: object, **names: object) -> None:
        kill()
        kill()

    nothing = {name: lambda *_, **__: None for name in ("start", "wind_down", "stop")}
    steps = {**nothing, "next": kill, when: twice if when == "next" else kill}
    handle: Any = SimpleNamespace(**steps)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray may have left its own
    try:
        with pytest.raises(KeyboardInterrupt if when == "stop" else Interrupted):
            run_to_end(handle, spec, 30.0, None, lambda line: None)
    finally:
        signal.signal(signal.SIGINT, before)
    result = load_result(spec.run_dir)
    assert result is not None
    assert result.status == "interrupted"
