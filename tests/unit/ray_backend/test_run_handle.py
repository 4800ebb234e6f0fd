"""How a run on Ray is listened to and ended; no cluster."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ft.config.load import apply_overrides
from raytune_ft.errors import Interrupted
from raytune_ft.ray_backend import run_handle
from raytune_ft.ray_backend.registry import Ended, Note
from raytune_ft.ray_backend.run_handle import GroupHandle, TrialHandle, run_to_end
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


class Waiting:
    """A registry, and workers that end what they are assigned as soon as they are asked to."""

    def __init__(self, ends: bool = True) -> None:
        self.ends, self.number, self.done = ends, 0, list[str]()
        self.events: list[dict[str, Any]] = []
        self.closed = threading.Event()

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=partial(self._answer, method))

    def _answer(self, method: str, *arguments: Any) -> Any:
        match method:
            case "open":
                return True
            case "assign":
                self.number += 1
                self.done.append(f"trains {arguments[2].run_dir.name}")
                return self.number
            case "take":
                events, self.events = self.events, []
                return events, False
            case "prune" | "group":
                return SimpleNamespace(workers=["a"], controller="c")
            case _:
                return None

    def train(self, *arguments: object) -> None:
        self.closed.wait(timeout=60)

    def ask(self, workers: list[Any], question: object) -> tuple[list[Any], int]:
        self.done.append("asked")
        if self.ends:
            self.events.append({"over": self.number})
        return [], 0

    def end(self, run: str, registry: Any) -> None:
        self.done.append("ended")
        self.closed.set()


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiting]:
    monkeypatch.setattr("ray.get", lambda answer: answer)
    monkeypatch.setattr(run_handle, "LEAVE_S", 0.2)
    waiting = Waiting()
    yield waiting
    waiting.closed.set()


def trial_of(spec: RunSpec, waiting: Waiting) -> TrialHandle:
    handle = TrialHandle(spec, waiting, train=waiting.train, ask=waiting.ask, end=waiting.end)
    handle.start()
    return handle


def another(spec: RunSpec, **changes: Any) -> RunSpec:
    config = apply_overrides(spec.config, {k.replace("__", "."): v for k, v in changes.items()})
    return replace(spec, config=config, run_dir=spec.run_dir.parent / "next")


@pytest.mark.parametrize("ends", ["by itself", "when it is asked"])
def test_workers_train_the_next_trial(ends: str, spec: RunSpec, waiting: Waiting) -> None:
    handle = trial_of(spec, waiting)
    if ends == "by itself":
        waiting.events.append({"over": 1})
        ended = handle.next()
        assert isinstance(ended, Ended)
        assert ended.error is None
    assert handle.leave()
    assert handle.take(another(spec, train__lr=1e-5))
    handle.start()
    waiting.events.append({"over": 1})  # of workers that started again in between
    assert handle.next() is None
    handle.stop()
    asked = ["asked"] * (ends == "when it is asked")
    assert waiting.done == ["trains run", *asked, "trains next", "ended"]


@pytest.mark.parametrize(
    "event", [{"down": True}, {"hang": Standing(0, 1, "", 0, 1, 9.0, 9.0, "")}]
)
@pytest.mark.parametrize("when", ["while it trains", "while it waits"])
def test_workers_that_had_a_fault_are_not_passed_on(
    event: dict[str, Any], when: str, spec: RunSpec, waiting: Waiting
) -> None:
    handle = trial_of(spec, waiting)
    events = [event, {"over": 1}] if when == "while it trains" else [{"over": 1}, event]
    waiting.events += events
    while not isinstance(handle.next(), Ended):
        pass
    assert not (handle.leave() and handle.take(another(spec)))
    assert waiting.done.count("trains next") == 0


def test_a_trial_that_does_not_leave_is_ended(spec: RunSpec, waiting: Waiting) -> None:
    waiting.ends = False
    assert not trial_of(spec, waiting).leave()


def test_other_processes_are_started_for_a_trial_that_needs_them(
    spec: RunSpec, waiting: Waiting
) -> None:
    handle = trial_of(spec, waiting)
    assert handle.leave()
    assert not handle.take(another(spec, parallel__hang_timeout_s=99))
    assert not handle.take(another(spec, model__path="/another"))


def test_workers_that_nobody_wants_end_by_themselves(
    spec: RunSpec, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_handle, "IDLE_S", 0.1)
    handle = trial_of(spec, waiting)
    assert handle.leave()
    assert waiting.closed.wait(timeout=10)
    assert not handle.take(another(spec))
