"""What the command line prints and returns, without a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_ft import app, cli
from raytune_ft.errors import ConfigError, Interrupted, RaytuneFtError, RunFailed
from raytune_ft.report import tables
from raytune_ft.report import terminal as show

ROOT = Path(__file__).parents[2]


def test_help_shows_every_command_and_an_example_of_each(capsys: pytest.CaptureFixture) -> None:
    assert cli.run_command(["--help"]) == 0
    commands = ("plan", "schema", "train", "sweep", "promote", "evaluate", "fetch")
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in commands)
    for name in commands:
        assert cli.run_command([name, "--help"]) == 0
        assert f"Example: raytune-ft {name} " in capsys.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'optuna', 'datasets', 'numpy'}"
    code = (
        "import sys; from raytune_ft.cli import run_command; run_command(['--help']);"
        f"print({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'; did you mean 'train'; see `raytune-ft --help`"),
        (["train"], "Missing argument 'CONFIG'; see `raytune-ft train --help`"),
        (["train", "x.yaml", "--foo"], "No such option: --foo; see `raytune-ft train --help`"),
        (["evaluate", "x"], "Missing option '--config'; see `raytune-ft evaluate --help`"),
    ],
)
def test_a_usage_error_is_one_line(
    capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert cli.run_command(arguments) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


@pytest.mark.parametrize("command", ["train", "sweep"])
@pytest.mark.parametrize(
    ("arguments", "resume", "overrides"),
    [
        ("x.yaml a=1", False, ["a=1"]),
        ("x.yaml a=1 --resume", True, ["a=1"]),
        ("x.yaml --resume a=1", True, ["a=1"]),
        ("--resume x.yaml a=auto", True, ["a=auto"]),
        ("x.yaml --resume --debug a=1", True, ["a=1"]),
        ("x.yaml --resume=auto a=1", "auto", ["a=1"]),
        ("x.yaml a=1 --resume auto", "auto", ["a=1"]),
        ("--resume auto x.yaml a=1 --wait-lock 3m", "auto", ["a=1"]),
        ("--resume auto -- x.yaml a=1", "auto", ["a=1"]),
    ],
)
def test_the_value_of_resume_may_be_left_out(
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    arguments: str,
    resume: bool | str,
    overrides: list[str],
) -> None:
    given: list[object] = []

    def run(file: Path, overrides: list[str], resume: bool | str, *_: object, **more: Any) -> None:
        given.extend([file, overrides, resume, more["wait_s"]])
        raise RunFailed("far enough")

    monkeypatch.setattr(app, command, run)
    assert cli.run_command([command, *arguments.split()]) == 1
    assert given == [Path("x.yaml"), overrides, resume, 180.0 if "3m" in arguments else None]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a", "is b", "write c"), 2),
        (RunFailed("step 3: loss nan"), 1),
        (Interrupted("stopped"), 130),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 1),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    error: BaseException,
    code: int,
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(app, "train", fail)
    assert cli.run_command(["train", "x.yaml"]) == code
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    if isinstance(error, RaytuneFtError):
        assert cli.run_command(["train", "x.yaml", "--debug"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_a_bug_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "train", lambda *arguments, **more: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.run_command(["train", "x.yaml"])


def test_an_error_stays_on_one_line_whatever_it_holds() -> None:
    assert show.error_line("a\nb\x1b[31m\u2028") == "error: a\\nb\\x1b[31m\\u2028"
    assert len(show.error_line("x" * 10_000)) < 1100


def test_schema_is_json_schema_and_reference_names_every_key(
    capsys: pytest.CaptureFixture,
) -> None:
    assert cli.run_command(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["name"]["type"] == "string"
    assert schema["additionalProperties"] is False
    assert cli.run_command(["schema", "--reference"]) == 0
    assert "train.lr: a number above 0; default 0.0002" in capsys.readouterr().out


def test_tables_are_not_cut_in_a_log(capsys: pytest.CaptureFixture) -> None:
    trials = [
        {
            "id": f"{i:05}",
            "status": "completed",
            "params": {"train.lr": 1.234e-5, "method.rank": 8},
            "eval_loss": None if i else 1.5,
            "examples": 1000,
            "wall_s": 1.0,
        }
        for i in range(2)
    ]
    show.print_table(tables.trials(trials, "00000"))
    lines = capsys.readouterr().out.splitlines()
    best = next(line for line in lines if "00000 *" in line)
    assert all(part in best for part in ("completed", "1.23e-05", "8", "1.5000", "1,000"))


@pytest.mark.e2e
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_signals_end_with_130_and_say_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    command = [
        *(sys.executable, "-m", "raytune_ft", "train", "jobs/quickstart.yaml"),
        *(f"storage={tmp_path}", "name=a", "train.max_examples=320", "train.epochs=null"),
        *("train.eval_every_examples=100000", "data.train.path=" + str(_short(tmp_path))),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.Popen(
        [*command, "train.max_examples=1000000"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert done.poll() is None, done.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done.send_signal(number)
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 130, errors
    assert errors.startswith("error: ")
    assert "--resume" in errors
    assert errors.count("\n") == 1
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["status"] == "interrupted"


def _short(folder: Path) -> Path:
    """Forty rows, so that evaluations take no time."""
    source = ROOT / "jobs" / "data" / "tiny_instructions" / "train.jsonl"
    path = folder / "rows.jsonl"
    path.write_text("".join(source.read_text().splitlines(keepends=True)[:40]))
    return path
