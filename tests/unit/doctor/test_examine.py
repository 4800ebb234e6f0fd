"""One table, one verdict: what fails, hangs or does not apply stops nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_ft.cli import run_command
from raytune_ft.doctor import examine
from raytune_ft.doctor.checks import CHECKS, reference
from raytune_ft.doctor.examine import HERE, Here, lacks, verdict
from raytune_ft.doctor.findings import Finding, Row, table, well
from raytune_ft.doctor.subject import Check, Subject
from raytune_ft.errors import DefectsFound

ROOT = Path(__file__).parents[3]
BROKEN = Finding("defect", "{what} is broken", "mend {what}")


def told(line: str) -> None: ...


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Check]:
    """An empty table of checks."""
    entries: dict[str, Check] = {}
    monkeypatch.setattr(examine, "CHECKS", entries)
    return entries


def test_a_check_that_fails_or_hangs_is_unknown_and_the_next_one_runs(
    checks: dict[str, Check],
) -> None:
    never = threading.Event()

    def fail(subject: Subject) -> Iterator[Row]:
        yield well("half of it")
        raise RuntimeError("out of order\nsecond line")

    checks["fails"] = Check(fail, "", ())
    checks["hangs"] = Check(lambda subject: [well(str(never.wait(20)))], "", (), limit_s=0.2)
    checks["last"] = Check(lambda subject: [BROKEN.on(HERE, what="it")], "", (BROKEN,))
    rows = examine.examine(Subject(Here()), told)
    never.set()
    assert [(name, row.status) for name, row in rows] == [
        ("fails", "ok"),
        ("fails", "unknown"),
        ("hangs", "unknown"),
        ("last", "defect"),
    ]
    assert rows[1][1].found.endswith("out of order")
    assert "0.2 s" in rows[2][1].found
    assert table(rows).rows[3] == ("last", "defect", HERE, "it is broken", "mend it")


def test_the_verdict() -> None:
    fine, odd = ("versions", well("all equal")), ("disk", Row("warning", HERE, "little", "more"))
    assert list(verdict([fine, odd], has_config=True))[-1] == "verdict: 0 defects, 1 warning"
    with pytest.raises(DefectsFound, match="1 defect, 1 warning: shm; the table") as caught:
        list(verdict([fine, odd, ("shm", BROKEN.on(HERE, what="it"))], has_config=True))
    assert caught.value.exit_code == 1
    unknown = ("gpus", Row("unknown", HERE, "cannot be checked", "look"))
    assert list(verdict([unknown], has_config=True))[-1].endswith("1 unknown")


def test_the_exit_code(
    checks: dict[str, Check], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    checks["fine"] = Check(lambda subject: [well("all equal")], "", ())
    assert run_command(["doctor"]) == 0
    assert "verdict: 0 defects, 0 warnings" in capsys.readouterr().out
    checks["it"] = Check(lambda subject: [BROKEN.on(HERE, what="it")], "", (BROKEN,))
    assert run_command(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "it is broken" in printed.out
    assert printed.err == "error: 1 defect, 0 warnings: it; the table has the remedies\n"


def test_what_is_left_out_is_named() -> None:
    subject = Subject(Here())
    left_out = [name for name, check in CHECKS.items() if lacks(check, subject)]
    assert {"storage", "locks", "environment", "clocks", "ports", "all-reduce"} <= set(left_out)
    first = next(verdict([("versions", well("all equal"))], has_config=False))
    assert all(name in first for name in left_out)
    assert "CONFIG" in first


def test_the_page_has_every_finding() -> None:
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert f"<!-- findings -->\n{reference()}<!-- /findings -->" in text, "run `make doctor-table`"
