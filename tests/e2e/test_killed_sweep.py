"""SIGKILL of the driver of a packed sweep, or of the Ray cluster under it; then `--resume`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from raytune_ft.config.search import AshaConfig
from raytune_ft.ray_backend.schedulers import scheduler_for
from tests.support.commands import ROOT, command, run_process
from tests.support.head import Head, start_head
from tests.support.runs import metrics

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
TRIALS, STEPS, EXAMPLES = 6, 60, 960
REPORT = re.compile(r"(trial-\d+): eval_loss \S+ after ([\d,]+) examples")


def _arguments(tmp_path: Path, name: str, *more: str) -> list[str]:
    return command(
        "sweep",
        "jobs/quickstart.yaml",
        f"storage={tmp_path}",
        f"name={name}",
        f"search.trials={TRIALS}",
        "search.execution=packed",
        "search.max_concurrent=4",
        "search.sampler=random",
        "search.space.train.batch_size=null",
        "train.epochs=null",
        f"train.max_examples={EXAMPLES}",
        "train.eval_every_examples=240",
        "checkpoint.every_examples=80",
        *more,
    )


@pytest.fixture
def head() -> Iterator[Callable[[], Head]]:
    """Starts clusters that are gone afterwards."""
    heads: list[Head] = []

    def start() -> Head:
        heads.append(start_head())
        return heads[-1]

    yield start
    for each in heads:
        if each.process.poll() is None:
            each.kill()


def _until_midway(sweep: Path, driver: subprocess.Popen[bytes]) -> None:
    """At least one trial has ended, and another one is in the middle."""
    deadline = time.monotonic() + 600
    while not (_ended(sweep) and any(5 < steps < STEPS - 10 for steps in _begun(sweep).values())):
        assert driver.poll() is None, "the sweep ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _ended(sweep: Path) -> dict[str, int]:
    """When the results of trials were written."""
    return {
        path.parent.name: path.stat().st_mtime_ns for path in sweep.glob("trials/*/result.json")
    }


def _steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in metrics(run_dir) if "loss" in line]


def _begun(sweep: Path) -> dict[str, int]:
    """Steps of trials that have begun and not ended."""
    found = {}
    for path in sweep.glob("trials/*/metrics.jsonl"):
        if path.parent.name not in _ended(sweep):
            found[path.parent.name] = len(path.read_text().splitlines())
    return found


def _start(arguments: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=os.environ | environment | {"PYTHONUNBUFFERED": "1"},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _resume(arguments: list[str], log: Path, head: Head) -> None:
    again = run_process([*arguments, "--resume"], 900, **head.environment)
    log.write_text(again.stdout + again.stderr)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]


def _result(sweep: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((sweep / "result.json").read_text())
    return content


def _assert_none_lost_or_run_twice(
    sweep: Path, ended: dict[str, int], begun: dict[str, int]
) -> None:
    result = _result(sweep)
    assert (result["status"], result["execution"]) == ("completed", "packed")
    assert [row["id"] for row in result["trials"]] == [f"trial-{n:03d}" for n in range(TRIALS)]
    assert {name: at for name, at in _ended(sweep).items() if name in ended} == ended
    assert begun
    for row in result["trials"]:
        steps = _steps(sweep / "trials" / row["id"])
        assert steps == list(range(1, len(steps) + 1))
        if row["status"] == "completed":
            assert len(steps) == STEPS


def test_a_killed_driver_on_a_cluster_that_stays(tmp_path: Path, head: Callable[[], Head]) -> None:
    cluster = head()
    undisturbed = run_process(
        _arguments(tmp_path, "whole", "search.scheduler=null"), 900, **cluster.environment
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    arguments = _arguments(tmp_path, "broken", "search.scheduler=null")
    sweep = tmp_path / "broken"
    driver = _start(arguments, tmp_path / "first.log", cluster.environment)
    _until_midway(sweep, driver)
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    ended, begun = _ended(sweep), _begun(sweep)
    assert not (sweep / "result.json").exists()
    _resume(arguments, tmp_path / "second.log", cluster)
    _assert_none_lost_or_run_twice(sweep, ended, begun)

    def ranking(name: str) -> list[tuple[str, Any]]:
        rows = sorted(_result(tmp_path / name)["trials"], key=lambda row: row["eval_loss"])
        return [(row["id"], row["params"]) for row in rows]

    assert ranking("broken") == ranking("whole")
    losses = [
        {row["id"]: row["eval_loss"] for row in _result(tmp_path / name)["trials"]}
        for name in ("broken", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_killed_cluster_under_a_driver_that_stays(
    tmp_path: Path, head: Callable[[], Head]
) -> None:
    """And the rules of ASHA, replayed on the order in which both drivers heard of evaluations."""
    asha = ["search.scheduler.grace_examples=240", "search.scheduler.reduction_factor=2"]
    arguments = _arguments(tmp_path, "broken", *asha)
    sweep, logs = tmp_path / "broken", [tmp_path / "first.log", tmp_path / "second.log"]
    cluster = head()
    driver = _start(arguments, logs[0], cluster.environment)
    try:
        _until_midway(sweep, driver)
        assert cluster.kill() > 5
        ended, begun = _ended(sweep), _begun(sweep)
        assert driver.wait(timeout=300) not in (0, 2)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
    assert "Traceback" not in logs[0].read_text()
    # What had ended by itself keeps its result; a driver that lives may write that others failed.
    _resume(arguments, logs[1], head())
    _assert_none_lost_or_run_twice(sweep, ended, begun)
    _assert_decisions_of_asha(sweep, logs, set(begun))


def _assert_decisions_of_asha(sweep: Path, logs: list[Path], unsure: set[str]) -> None:
    """The last word on a trial before the fault may have been lost with it."""
    rows = {row["id"]: row for row in _result(sweep)["trials"]}
    config = AshaConfig(grace_examples=240, reduction_factor=2)
    rule = scheduler_for(config, EXAMPLES, "eval_loss", "min")
    heard = [
        (number, name, int(examples.replace(",", "")))
        for number, log in enumerate(logs)
        for name, examples in REPORT.findall(log.read_text())
    ]
    added = set[str]()
    last = {(number, name): examples for number, name, examples in heard}
    stopped = 0
    for number, name, examples in heard:
        values = {
            line["examples"]: line["eval_loss"]
            for line in metrics(sweep / "trials" / name)
            if "eval_loss" in line
        }
        trial = type("Trial", (), {"config": {"trial": name, "budget": EXAMPLES}})
        if name not in added:
            added.add(name)
            rule.on_trial_add(None, trial)
        result = {"examples": examples, "eval_loss": values[examples]}
        stops = rule.on_trial_result(None, trial, result) == TrialScheduler.STOP
        if number == 0 and name in unsure and last[0, name] == examples:
            continue
        row = rows[name]
        assert stops == (row["status"] == "pruned" and row["examples"] == examples), (
            name,
            examples,
        )
        stopped += stops
    assert stopped
