"""What the built-in rewards give, and what the code of a completion may do."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.rewards import REWARDS, reward_of
from raytune_ft.rewards.base import Group, Score, Scorer, Working
from raytune_ft.rewards.code import code_of


def scorer(name: str, **keys: Any) -> Scorer:
    reward = reward_of(name)
    config = reward.config.model_validate({"name": name, **keys})
    config.check()
    made: Scorer = reward.implementation()(config)
    return made


def group(*completions: str, reference: str = "", tokens: int = 0, **columns: Any) -> Group:
    ids = [[5] * (tokens or len(text)) for text in completions]
    return Group("rows:1", "the prompt", reference, completions, ids, columns)


def rated(made: Scorer, given: Group) -> list[float | None]:
    found = [one for one in made.rate(given) if not isinstance(one, Working)]
    return [one.value if isinstance(one, Score) else one for one in found]  # type: ignore[misc]


def test_exact_match() -> None:
    assert rated(scorer("exact_match"), group(" a b\n", "a  b", reference="a b")) == [1, 0]
    by_column = scorer("exact_match", column="solution")
    assert by_column.columns == ("solution",)
    assert rated(by_column, group("7", solution=7)) == [1]
    assert rated(by_column, group("7", solution=None)) == [None]


def test_regex_and_format() -> None:
    assert rated(scorer("regex", pattern=r"\d{2}"), group("a 12", "a 1")) == [1, 0]
    said = (
        "<think>a</think>\n<answer>b\nc</answer> ",
        "<answer>b</answer><think>a</think>",
        "<think>a</think> so <answer>b</answer>",
        "<think><think>a</think><answer>b</answer>",
    )
    assert rated(scorer("format"), group(*said)) == [1, 0, 0, 0]


def test_length() -> None:
    near = scorer("length", target=80)
    assert [rated(near, group("x", tokens=n))[0] for n in (80, 40, 160, 400)] == [1, 0.5, 0, 0]
    over = scorer("length", limit=100, buffer=20)
    found = [rated(over, group("x", tokens=n))[0] for n in (10, 80, 90, 100, 500)]
    assert found == [0, 0, -0.5, -1, -1]


def test_repetition() -> None:
    made = scorer("repetition", ngram=2)
    assert rated(made, group("a b c d", "a b a b", "a", "")) == [0, pytest.approx(2 / 3 - 1), 0, 0]


def test_gsm8k() -> None:
    made = scorer("gsm8k")
    said = ("so #### 1,200", "#### 7 no: #### $1200.0", "1200", "#### 1.2.3")
    assert rated(made, group(*said, reference="it is\n#### 1200")) == [1, 1, 0, 0]
    assert rated(made, group("#### 1", reference="none")) == [None]


def test_math() -> None:
    pytest.importorskip("math_verify", reason="the extra math is not installed")
    made = scorer("math")
    found = rated(made, group("$\\frac{2}{4}$", "$\\boxed{0.5}$", "$2$", reference="$\\frac12$"))
    assert found == [1, 1, 0]


def test_code_is_taken_from_the_last_block() -> None:
    assert code_of("x = 1") == "x = 1"
    assert code_of("first\n```python\nx = 1\n```\nthen\n```\nx = 2\n```\n") == "x = 2\n"


ADD = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    ("code", "share"),
    [
        (ADD, 1.0),
        (ADD + "print('noise')", 1.0),
        ("def add(a, b):\n    return 3\n", 0.5),
        ("def add(a, b:\n", 0.0),
        ("import os\nos._exit(0)", 0.0),  # leaving early is no success
        ("import sys\nsys.exit()", 0.0),
        (ADD + "x = 'a' * 10**9", 0.0),  # memory
        (ADD + "open('f', 'wb').write(b'a' * 10**8)", 0.0),  # a file
        (ADD + "while True: pass", 0.0),
        (ADD + "import time\ntime.sleep(60)", 0.0),
        (ADD + "import os\nassert not os.environ.get('SECRET')", 1.0),
        (ADD + "import os\nassert sorted(os.listdir()) == ['program.py', 'said']", 1.0),
    ],
)
def test_code(code: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    tests = ["assert add(1, 2) == 3", "assert add(5, 2) == 7"]
    made = scorer("code", timeout_s=2.0)
    start = time.monotonic()
    assert rated(made, group(f"```python\n{code}\n```", tests=tests)) == [share]
    assert time.monotonic() - start < 10


def test_what_code_starts_ends_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    start = "import subprocess, sys, pathlib\n"
    start += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    start += f"pathlib.Path({str(mark)!r}).write_text(str(p.pid))\n"
    assert rated(scorer("code", timeout_s=5.0), group(start, tests="pass")) == [1]
    pid = int(mark.read_text())
    deadline = time.monotonic() + 5
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_every_entry_names_itself() -> None:
    for name, reward in REWARDS.items():
        assert reward.config.model_fields["name"].annotation.__args__ == (name,)  # type: ignore[union-attr]
        assert callable(reward.implementation())
