"""A judge over real HTTP, with failures in the middle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.rewards import Judge
from raytune_ft.errors import ConfigError
from raytune_ft.rewards import judge
from raytune_ft.rewards.base import Group
from raytune_ft.rewards.pool import Rewards, started
from tests.support.judge import KEY, Server, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


def configured(server: Server, folder: Path, **keys: Any) -> Judge:
    given = {"name": "judge", "url": server.url, "model": "m", "api_key": KEY}
    return Judge.model_validate({**given, "answers": str(folder), "timeout_s": 5.0, **keys})


def values(rewards: Rewards, *completions: str) -> list[float | None]:
    group = Group("r:1", "why?", "", completions, [[1]] * len(completions))
    return [one["judge"] for one in rewards.score([group])[0]]


def test_grades_with_failures_in_the_middle(server: Server, tmp_path: Path) -> None:
    config = configured(server, tmp_path / "answers")
    with started([config]) as rewards:
        server.statuses = [200, 503, 429, 200]
        assert values(rewards, "a", "bbb", "mumble", "cc") == [0.1, 0.3, None, 0.2]
        tally = rewards.processes[0].tally
    assert tally.counts == {"questions": 4, "questions asked again": 2}
    assert tally.missing == {"NoAnswer": 1}
    assert len(server.questions) == 4
    kept = "".join(file.read_text() for file in (tmp_path / "answers").iterdir())
    assert KEY not in kept
    # Another run asks only what is new, and reads past a line that was cut short.
    file = next((tmp_path / "answers").iterdir())
    file.write_text(kept + '{"question": "')
    with started([config]) as rewards:
        assert values(rewards, "a", "dddd") == [0.1, 0.4]
    assert len(server.questions) == 5


def test_pairs_are_asked_in_both_orders(server: Server, tmp_path: Path) -> None:
    config = configured(server, tmp_path, mode="pairs")
    with started([config]) as rewards:
        # The longer answer wins each of the three comparisons.
        assert values(rewards, "a", "bb", "ccc") == [0, 0.5, 1]
        assert len(server.questions) == 6
        # Equal answers are a tie, and the judge is not asked.
        assert values(rewards, "a", "a") == [0.5, 0.5]
        assert len(server.questions) == 6
        assert values(rewards, "first", "first one") == [0.5, 0.5]
        counts = rewards.processes[0].tally.counts
        assert counts["comparisons"] == 4
        assert counts["comparisons whose two orders disagree"] == 1
        assert values(rewards, "alone") == [None]


def test_questions_of_all_prompts_are_asked_at_the_same_time(
    server: Server, tmp_path: Path
) -> None:
    server.delay_s = 0.25
    groups = [Group(f"r:{i}", f"why {i}?", "", ["a", "bb"], [[1]] * 2) for i in range(8)]
    with started([configured(server, tmp_path, at_once=16, mode="pairs")]) as rewards:
        start = time.monotonic()
        found = rewards.score(groups)
        assert time.monotonic() - start < 16 * 0.25 / 2
    assert [[one["judge"] for one in each] for each in found] == [[0, 1]] * 8
    assert len(server.questions) == 16


def test_a_question_without_an_answer_has_no_score(server: Server, tmp_path: Path) -> None:
    with started([configured(server, tmp_path, retries=1, at_once=1)]) as rewards:
        server.statuses = [500, 500]
        assert values(rewards, "a", "b") == [None, 0.1]
        assert "HTTP 500" in rewards.processes[0].tally.first_missing


def test_a_redirect_does_not_get_the_key(server: Server, tmp_path: Path) -> None:
    with Server() as other, started([configured(server, tmp_path, retries=0)]) as rewards:
        server.statuses, server.location = [307], f"{other.url}/chat/completions"
        assert values(rewards, "a") == [None]
        assert not other.questions


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"url": "http://127.0.0.1:9/v1"}, "refused"),
        ({"api_key": "another-key"}, "HTTP 401"),
        ({"model": "other"}, "HTTP 404"),
    ],
)
def test_refused_at_the_start(
    keys: dict[str, str], reason: str, server: Server, tmp_path: Path
) -> None:
    config = configured(server, tmp_path, **keys)
    refused = pytest.raises(ConfigError, match=f"does not answer .*{reason}")
    with refused as raised, started([config]):
        pass
    assert KEY not in str(raised.value)
    assert "another-key" not in str(raised.value)


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("0.75", 0.75), ("Grade: 1", 1), ("0", 0), ("from 0 to 1: .5", 0.5), ("1.0.", 1)],
)
def test_grades_are_read(reply: str, grade: float) -> None:
    assert judge._grade(reply) == grade


@pytest.mark.parametrize("reply", ["10", "good", "7/10", "1.5"])
def test_replies_that_are_no_grade(reply: str) -> None:
    with pytest.raises(judge.NoAnswer):
        judge._grade(reply)
