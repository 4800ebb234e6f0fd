"""How a run on Ray is listened to and ended; no cluster."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ft.errors import Interrupted
from raytune_ft.ray_backend import run_handle as ray_train
from raytune_ft.ray_backend.run_handle import Note, TrainJob, fit
from raytune_ft.train.result import load_result
from raytune_ft.train.spec import RunSpec
from raytune_ft.train.watchdog import Standing
from tests.support.runs import make_config


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    config = make_config(tmp_path, tmp_path / "rows.jsonl")
    (tmp_path / "run").mkdir()
    return RunSpec(config, tmp_path / "run", tmp_path / "data", "eval_loss", "min")


@pytest.fixture
def job(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> TrainJob:
    """One whose switchboard says that there are two workers."""
    group = SimpleNamespace(remote=lambda run: SimpleNamespace(workers=["a", "b"]))
    monkeypatch.setattr(ray_train, "ray", SimpleNamespace(get=lambda answer: answer))
    return TrainJob(spec, SimpleNamespace(end=group, group=group), lambda payload: "")


@pytest.mark.parametrize(
    ("answers", "waits"),
    [(([False, False], 0), False), (([False], 0), False), (([], 1), True), (([True], 0), True)],
)
def test_only_workers_that_have_nothing_to_save_are_not_waited_for(
    answers: tuple[list[bool], int], waits: bool, job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_train, "_ask", lambda workers, question: answers)
    joined: list[float] = []
    job._thread = SimpleNamespace(  # type: ignore[assignment]
        is_alive=lambda: len(joined) < 3, join=lambda timeout: joined.append(timeout)
    )
    job.wind_down(1000)
    assert len(joined) == (3 if waits else 0)


def test_a_hang_is_forgotten_when_all_that_hung_are_awake(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(rank: int) -> list[Any]:
        return list(job._heard({"hang": Standing(rank, 1, "step 1", 0, 1, 9.0, "")}))

    monkeypatch.setattr(ray_train, "_ask", lambda workers, question: ([], 2))
    job._error = RuntimeError("something else")
    assert isinstance(hang(0)[0], Note)
    assert hang(1) == []
    job._heard({"awake": 0})
    assert "no progress" in str(job._failure())
    job._heard({"awake": 1})
    assert "something else" in str(job._failure())


@pytest.mark.parametrize("when", ["next", "wind_down", "stop"])
def test_a_second_signal_leaves_a_result_too(
    when: str, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*arguments: object, **names: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    def twice(*arguments: object, **names: object) -> None:
        kill()
        kill()

    nothing = {name: lambda *_, **__: None for name in ("start", "wind_down", "stop")}
    steps = {**nothing, "next": kill, when: twice if when == "next" else kill}
    monkeypatch.setattr(ray_train, "TrainJob", lambda *_: SimpleNamespace(**steps))
    monkeypatch.setattr(ray_train, "connected", nullcontext)
    monkeypatch.setattr(ray_train, "require_capacity", lambda parallel: 1)
    monkeypatch.setattr(ray_train, "start_switchboard", lambda slots: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray may have left its own
    try:
        with pytest.raises(KeyboardInterrupt if when == "stop" else Interrupted):
            fit(spec)
    finally:
        signal.signal(signal.SIGINT, before)
    result = load_result(spec.run_dir)
    assert result is not None
    assert result.status == "interrupted"
