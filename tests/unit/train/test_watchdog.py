"""A process that hangs says where, ends, and can be resumed; one that lives is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from raytune_ft.train import watchdog as heartbeat
from raytune_ft.train.watchdog import (
    Heartbeat,
    Standing,
    collectives,
    log_text,
    summary,
    watched,
)
from tests.support.commands import ROOT
from tests.support.distributed import run_distributed
from tests.support.runs import losses, make_config, make_inputs, run


def standing(rank: int, phases: int, done: float, of: int) -> Standing:
    return Standing(rank, phases, f"step {phases}", done, of, 9.0, 9.0, f"stack of {rank}")


def test_the_summary_names_who_is_behind_and_who_is_silent() -> None:
    answers = [standing(0, 5, 1.5, 2), standing(2, 5, 2.5, 3), standing(3, 4, 2, 2)]
    assert summary(answers, 5, 60) == (
        "no progress for 60 s; "
        "ranks 1, 4 did not answer (stopped, or stuck outside Python); "
        "rank 3 is behind, at step 4, after its 2 micro-batches; "
        "ranks 0, 2 at step 5, backward of micro-batch 2 of 2"
    )
    text = log_text(answers, 5, 60)
    stacks = [text.index(f"stack of {rank}") for rank in (3, 0, 2)]
    assert stacks == sorted(stacks)


def test_places_in_a_step_are_ordered() -> None:
    heart = Heartbeat()
    orders = []
    for step in ("step 1", "step 2"):
        heart.enter(step)
        orders.append(heart.standing().order())
        for done in (0, 0.5, 1, 1.5, 2):
            heart.beat(done, 2)
            orders.append(heart.standing().order())
    assert orders == sorted(orders)
    assert len(set(orders)) == len(orders)
    assert heart.standing().place() == "step 2, after its 2 micro-batches"
    assert "test_places_in_a_step" not in heart.standing().stacks  # only other threads


def test_auto_follows_the_steps_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading and the first steps may be slow; then 20 times the longest silence, within bounds."""
    now = 0.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    heart = Heartbeat()

    def step(seconds: float) -> None:
        nonlocal now
        heart.enter("step")
        heart.beat(0, 2)
        for done in (1, 2):
            now += seconds
            heart.beat(done, 2)

    heart.enter("start")
    now += 900
    for _ in range(3):
        step(2.0)
        assert heart.limit_s == 1800
    heart.enter("checkpoint")
    now += 200
    heart.enter("step")
    assert heart.limit_s == 300  # and not 20 * 200: nothing is said of steps by a checkpoint
    step(25.0)
    assert heart.limit_s == 500
    step(1000.0)
    assert heart.limit_s == 1800
    step(1000.0)
    heart.begin(0, "auto")  # of another run nothing is seen yet
    for _ in range(2):
        step(2.0)
    heart.enter("checkpoint")
    assert heart.limit_s == 1800
    step(2.0)
    heart.enter("checkpoint")
    assert heart.limit_s == 300
    heart.timeout_s = 60.0
    assert heart.limit_s == 60


def _wait_for_the_other(folder: Path) -> None:
    """Rank 0 is in a collective that rank 1 comes to late."""
    told = folder / "told"
    dist.all_reduce(torch.zeros(3))
    if dist.get_rank() == 1:
        while not told.exists():
            time.sleep(0.01)
        dist.all_reduce(torch.zeros(5))
        return
    thread = threading.Thread(target=lambda: dist.all_reduce(torch.zeros(5)))
    thread.start()
    time.sleep(0.3)
    found = Heartbeat().standing().stacks
    told.touch()
    thread.join()
    tail = found[found.index("collectives that have not ended: 1, ") :].splitlines()
    assert tail[1].endswith(" gloo:all_reduce Float [[5]] of default_pg, scheduled"), found
    assert " gloo:all_reduce Float [[3]] of default_pg" in tail[2], found
    assert "collectives that have not ended: 0" in collectives()


@pytest.mark.slow
def test_a_report_names_the_collectives_that_have_not_ended(tmp_path: Path) -> None:
    run_distributed(_wait_for_the_other, 2, tmp_path)


def test_a_flight_recorder_that_hangs_delays_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may wait for the driver of a GPU, as the run does."""
    over = threading.Event()
    monkeypatch.setattr(heartbeat, "RECORDER_S", 0.1)
    stuck = SimpleNamespace(_dump_nccl_trace_json=lambda *arguments: over.wait(30) and "{}")
    monkeypatch.setitem(sys.modules, "torch._C._distributed_c10d", stuck)
    assert collectives() == "collectives: the flight recorder does not answer"
    over.set()


def test_a_process_that_beats_is_left_alone() -> None:
    heart, told = Heartbeat(), []
    with watched(heart, 3, 0.3, told.append):
        assert heart.watched
        for done in range(8):
            heart.beat(done, 8)
            time.sleep(0.1)
    assert told == []
    assert not heart.watched


def test_a_beat_that_comes_late_saves_the_process() -> None:
    heart = Heartbeat()
    told: list[Standing] = []

    def hear(where: Standing) -> None:
        told.append(where)
        heart.beat(1, 1)

    with watched(heart, 3, 0.2, hear):
        deadline = time.monotonic() + 10
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
    assert told[0].rank == 3
    assert told[0].silent_s >= 0.2
    assert "test_a_beat_that_comes_late" in told[0].stacks


HANGS = """
import sys, time
from pathlib import Path
from raytune_ft.model.objectives import TokenObjective
from tests.support.runs import make_config, run
model, rows, run_dir = map(Path, sys.argv[1:])
right, seen = TokenObjective.losses, []

def stand_still(*arguments):
    seen.append(1)
    if len(seen) == 25:
        time.sleep(1000)
    return right(*arguments)

TokenObjective.losses = stand_still
run(make_config(model, rows, {"parallel.hang_timeout_s": 6.0}), run_dir)
"""


@pytest.mark.slow
def test_a_single_process_that_hangs_fails_and_can_be_resumed(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    run_dir = tmp_path / "run"
    arguments = [sys.executable, "-c", HANGS, *map(str, inputs), str(run_dir)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == heartbeat.HUNG_EXIT_CODE == 1
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"] == (
        "RunFailed: no progress for 6 s; rank 0 at step 25, forward of micro-batch 1 of 1; "
        "see hang.log"
    )
    assert result["best"]["step"] == 20
    text = (run_dir / "hang.log").read_text()
    assert "in stand_still" in text
    assert "in stand_still" in done.stderr
    assert run(make_config(*inputs), run_dir).status == "completed"
    assert len(losses(run_dir)) == 40


SLEEPS = """
import sys, time
from types import SimpleNamespace
from raytune_ft.train import watchdog as heartbeat
from raytune_ft.train.watchdog import watched
from raytune_ft.train.stopping import own_host
heartbeat.NATIVE_GRACE_S = 0.5

with own_host(None, heartbeat.Heartbeat()) as host, watched(host.heart, 0, 1.5, sys.exit):
    print("ready", flush=True)
    for beat in range(20):
        host.heart.beat(beat, 20)
        time.sleep(0.1)
"""


def test_a_process_that_is_suspended_goes_on_when_it_wakes() -> None:
    arguments = [sys.executable, "-c", SLEEPS]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == 0


HOLDS = """
import ctypes
from raytune_ft.train import watchdog as heartbeat
from raytune_ft.train.watchdog import Heartbeat, watched
heartbeat.NATIVE_GRACE_S = 1.0

def never_lets_go():
    ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the interpreter's lock

with watched(Heartbeat(), 0, 1.0, print):
    never_lets_go()
"""


def test_native_code_that_holds_the_interpreter_is_ended_too() -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HOLDS], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "in never_lets_go" in done.stderr
    assert done.stdout == ""
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("done", [0, 1])
def test_what_has_no_micro_batches_is_named_by_its_phase(done: int) -> None:
    assert Standing(0, 1, "checkpoint of step 4", done, 0, 1.0, 9.0, "").place() == (
        "checkpoint of step 4"
    )
