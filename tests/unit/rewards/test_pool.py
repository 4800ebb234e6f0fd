"""Rewards in real processes: hanging, dying, wrong, and quick enough."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.rewards import FunctionReward
from raytune_ft.errors import ConfigError, RunFailed
from raytune_ft.rewards.base import Group
from raytune_ft.rewards.pool import Rewards, check_columns, started

OWN = """
import asyncio, math, os, signal, time
from dataclasses import dataclass
print("what a file prints is no output of the program")

def words(prompt, reference, generated):
    return len(generated.split())

def odd(prompt, reference, generated):
    if generated == "hang":
        time.sleep(60)
    if generated == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if generated == "leave":
        os._exit(3)
    if generated == "raise":
        raise KeyError("no")
    return {"nan": math.nan, "none": None, "text": "x", "true": True, "huge": 10**400}.get(
        generated, 0.5
    )

def trl(prompts, completions, completion_ids, answer, **kwargs):
    assert kwargs["trainer_state"] is None
    kwargs["log_metric"]("m", 1.0)
    if completions[0] == "hang":
        time.sleep(60)
    if completions[0] == "short":
        return [1.0]
    return [float(a in str(c)) + len(i) for a, c, i in zip(answer, completions, completion_ids)]

def turns(prompts, completions, **kwargs):
    return [p[-1]["content"] == c[0]["content"] for p, c in zip(prompts, completions)]

async def later(completions, answer=None, **kwargs):
    await asyncio.sleep(0)
    return [None for _ in completions]

def two(prompt, generated):
    return 1.0

def quick(prompt, reference, generated):
    end = time.perf_counter() + 1e-4
    while time.perf_counter() < end:
        pass
    return 1.0
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


def rewards_of(file: Path, *functions: str, timeout_s: float = 1.0) -> Any:
    return started(
        [FunctionReward(name=f"{file}:{name}", timeout_s=timeout_s) for name in functions]
    )


def group(*completions: str, **columns: Any) -> Group:
    ids = [list(range(len(text))) for text in completions]
    return Group("rows:7", "the prompt", "the reference", completions, ids, columns)


def values(rewards: Rewards, *groups: Group) -> list[list[list[float | None]]]:
    return [[list(one.values()) for one in each] for each in rewards.score(groups)]


def test_both_forms_and_several_rewards_at_once(own: Path) -> None:
    with rewards_of(own, "words", "trl", "later") as rewards:
        assert rewards.names == ["words", "trl", "later"]
        found = rewards.score([group("a b", "x c d e", answer="x"), group("a", answer="b")])
        check_columns(rewards, ["answer", "other"], "rows.jsonl")
        with pytest.raises(ConfigError, match=r"rewards\.trl takes 'answer', which is no column"):
            check_columns(rewards, ["question"], "rows.jsonl")
    assert found[0][0] == {"words": 2, "trl": 3, "later": None}
    assert found[0][1] == {"words": 4, "trl": 8, "later": None}
    assert found[1][0] == {"words": 1, "trl": 1, "later": None}
    assert rewards.processes[2].tally.missing == {"None": 3}


def test_conversations_are_lists_of_turns(own: Path) -> None:
    chat = Group("r:1", "user: b", "", ["b", "c"], [[1], [1]], {}, [{"role": "u", "content": "b"}])
    with rewards_of(own, "turns") as rewards:
        assert values(rewards, chat) == [[[1], [0]]]


def test_a_hung_call_costs_its_time_limit_once(own: Path) -> None:
    with rewards_of(own, "odd") as rewards:
        start = time.monotonic()
        assert values(rewards, group("a", "hang", "b"), group("c")) == [
            [[0.5], [None], [0.5]],
            [[0.5]],
        ]
        assert 1 < time.monotonic() - start < 20
        tally = rewards.processes[0].tally
    assert tally.missing == {"time limit": 1}
    assert (tally.scored, tally.mean) == (3, 0.5)
    assert "rows:7" in tally.first_missing


def test_a_hung_list_has_no_scores(own: Path) -> None:
    with rewards_of(own, "trl") as rewards:
        found = values(rewards, group("hang", "x", answer="x"), group("x", answer="x"))
    assert found == [[[None], [None]], [[2.0]]]


def test_a_death_costs_one_score(own: Path) -> None:
    with rewards_of(own, "odd") as rewards:
        assert values(rewards, group("die", "a", "leave")) == [[[None], [0.5], [None]]]
        tally = rewards.processes[0].tally
    assert tally.missing == {"its process died": 2}
    assert "signal 9" in tally.first_missing


def test_three_deaths_in_a_row_end_the_run(own: Path) -> None:
    with rewards_of(own, "odd") as rewards:
        assert values(rewards, group("die", "die", "a", "die", "a"))[0][2] == [0.5]
        with pytest.raises(RunFailed, match=r"odd died 3 times in a row .*rows:7: 'the prompt'"):
            values(rewards, group("die", "die", "die"))


def test_what_is_no_number_is_none_and_counted(own: Path) -> None:
    with rewards_of(own, "odd") as rewards:
        found = values(rewards, group("nan", "none", "text", "raise", "huge", "true"))
        tally = rewards.processes[0].tally
    assert found == [[[None], [None], [None], [None], [None], [1.0]]]
    assert tally.missing == {
        "nan is not a finite number": 1,
        "None": 1,
        "str is not a number": 1,
        "int is not a number": 1,
        "KeyError": 1,
    }


def test_another_number_of_scores_ends_the_run(own: Path) -> None:
    with (
        rewards_of(own, "trl") as rewards,
        pytest.raises(RunFailed, match="gave 1 scores for 2 completions, on rows:7"),
    ):
        values(rewards, group("short", "b", answer="x"))


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        (OWN, "wrods", r"names no function of own\.py, which has words, odd"),
        ("import nowhere_to_be_found\ndef f(a, b, c): ...", "f", r"cannot be loaded \(ModuleNotF"),
        ("import os\ndef f(a, b, c): ...\nos._exit(1)", "f", "its process died"),
        (OWN, "two", r"takes \(prompt, generated\), and a reward takes"),
        ("def f(:", "f", "cannot be read"),
    ],
)
def test_refused_before_anything_starts(text: str, function: str, message: str, own: Path) -> None:
    own.write_text(text)
    with pytest.raises(ConfigError, match=message), rewards_of(own, function):
        pass


def test_a_thousand_scores_of_a_tenth_of_a_millisecond_take_a_third_of_a_second(own: Path) -> None:
    """Of the 0.3 s the calls themselves are 0.1 s. Other work on the machine slows down both, so
    that the best of several rounds is compared with the same calls in this process.
    """
    groups = [group(*["a"] * 8) for _ in range(125)]
    quick = runpy.run_path(str(own))["quick"]
    ratios = []
    with rewards_of(own, "quick") as rewards:
        for _ in range(10):
            start = time.perf_counter()
            values(rewards, *groups)
            middle = time.perf_counter()
            for _ in range(1000):
                quick("", "", "a")
            ratios.append((middle - start) / (time.perf_counter() - middle))
    assert min(ratios) < 3


def test_processes_end_with_a_driver_that_was_killed(own: Path, tmp_path: Path) -> None:
    own.write_text(
        "import os, pathlib, time\n"
        "def f(prompt, reference, generated):\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
    )
    program = (
        "from raytune_ft.config.rewards import FunctionReward\n"
        "from raytune_ft.rewards.base import Group\n"
        "from raytune_ft.rewards.pool import started\n"
        f"with started([FunctionReward(name={str(own) + ':f'!r}, timeout_s=50.0)]) as rewards:\n"
        "    rewards.score([Group('r', 'p', '', ['a'], [[1]])])\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.1)
    driver.kill()
    driver.wait()
    pid = int((tmp_path / "pid").read_text())
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("it is still there")
