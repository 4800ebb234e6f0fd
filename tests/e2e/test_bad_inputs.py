"""A wrong input ends with exit code 2, one `error:` line that helps, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raytune_ft.cli import run_command
from raytune_ft.config.load import load_config
from raytune_ft.config.resolve import resolve
from raytune_ft.rundir import open_run

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "jobs" / "quickstart.yaml"
ROWS = ROOT / "jobs" / "data" / "tiny_instructions" / "train.jsonl"

pytestmark = pytest.mark.e2e

# name: (command, overrides or the text of a file, words of the message)
CASES: dict[str, tuple[str, list[str], str]] = {
    "misspelt key": (
        "train",
        ["train.batchsize=4"],
        "train.batchsize is not a key; did you mean train.batch_size?",
    ),
    "wrong type": (
        "train",
        ["train.lr=fast"],
        "train.lr=fast is not a number above 0; write one, or leave the key out for 0.0002",
    ),
    "no override": ("train", ["train.lr"], "train.lr is not an override; write section.key=value"),
    "missing data file": ("train", ["data.train.path=nowhere.jsonl"], "nowhere.jsonl"),
    "unknown model": ("train", ["model.path=/nowhere/model"], "model.path=/nowhere/model does not"),
    "unknown built-in model": ("train", ["model.path=builtin:huge"], "write builtin:tiny"),
    "empty data set": ("train", ["data.train.path={tmp}/empty.jsonl"], "empty.jsonl"),
    "column that does not exist": ("train", ["data.train.prompt=question"], "question"),
    "unknown target layer": ("train", ["method.targets=[q_prj]"], "q_proj"),
    "batch smaller than workers": (
        "train",
        ["train.batch_size=4", "parallel.workers=8"],
        "train.batch_size=4 is smaller than parallel.workers=8; write at least 8",
    ),
    "unwritable storage": ("train", ["storage=/proc/runs"], "write a storage directory that this"),
    "storage is a file": ("train", ["storage={tmp}/empty.jsonl"], "cannot be written"),
    "object store": ("train", ["storage=gs://bucket/runs"], "is a URL, and not one of a bucket"),
    "unknown key in the search space": (
        "sweep",
        ["search.space.train.lrr.choice=[1.0]"],
        "search.space.train.lrr names no key of the config; did you mean train.lr?",
    ),
    "value of the search space out of range": (
        "sweep",
        ["search.space.train.batch_size.choice=[8, 0]"],
        "train.batch_size=0 is not a whole number above 0",
    ),
    "search over what trials are measured on": (
        "sweep",
        ["search.space.data.max_length.choice=[8, 16]"],
        "cannot be searched over",
    ),
    "grace period beyond the budget": (
        "sweep",
        ["search.scheduler.grace_examples=100000"],
        "grace_examples=100000 is more than the",
    ),
    "methods that cannot be packed together": (
        "sweep",
        [
            "search.execution=packed",
            "search.space.method.name.choice=[lora, full]",
            "search.space.method.rank=null",
        ],
        "search.execution=packed trains LoRA trials on one frozen base, and method.name=full tr",
    ),
    "packed under deepspeed": (
        "sweep",
        ["search.execution=packed", "parallel.workers=2", "parallel.strategy=deepspeed"],
        "parallel.strategy=deepspeed shards trained weights",
    ),
    "impossible constraint": (
        "sweep",
        ["search.constraints=[train.lr > 1]"],
        "search.constraints: train.lr > 1 is met by none of 10,000 draws",
    ),
    "storage that does not answer": (
        "sweep",
        ["search.storage=postgresql://me@127.0.0.1:1/db"],
        "search.storage=postgresql://me@127.0.0.1:1/db cannot be opened",
    ),
    "budget smaller than one trial": (
        "sweep",
        ["search.budget.examples=100"],
        "search.budget.examples=100 is less than the 2764 examples of one trial",
    ),
    "sweep without a search": ("sweep", ["search=null"], "has no search section"),
    "resume without a run": ("train", ["--resume"], "holds no run to resume"),
    "password in the clear": (
        "sweep",
        ["search.storage=postgresql://me:hunter2@host/db"],
        "search.storage holds a password",
    ),
    "environment variable that is not set": (
        "sweep",
        ["search.storage=postgresql://me:${RAYTUNE_FT_UNSET}@host/db"],
        "is not set; write `export RAYTUNE_FT_UNSET=...` first",
    ),
}
FILES = {
    "missing file": (None, "cannot be read (No such file or directory); name a config file"),
    "duplicate key": ("name: a\nname: b\n", "writes 'name' twice; delete one of the two"),
    "no YAML": ("name: [a\n", "is not YAML"),
    "no mapping": ("- a\n", "is not a mapping"),
    "empty": ("", "is not a mapping"),
    "binary": (b"\xff\xfe\x00", "cannot be read (is not UTF-8 text)"),
}

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must fail and gives its error line; nothing may stay in the storage."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAYTUNE_FT_UNSET", raising=False)
    (tmp_path / "empty.jsonl").touch()

    def run(command: str, file: Path, *arguments: str) -> str:
        filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
        storage = f"storage={tmp_path}/runs"
        code = run_command([command, str(file), storage, "name=bad", *filled])
        errors = capsys.readouterr().err
        assert (code, errors.count("\n")) == (2, 1), errors
        assert errors.startswith("error: ")
        assert "Traceback" not in errors
        assert "hunter2" not in errors
        return errors

    return run


@pytest.mark.parametrize("case", CASES)
def test_bad_value(run: Run, case: str, tmp_path: Path) -> None:
    command, arguments, message = CASES[case]
    assert message in run(command, QUICKSTART, *arguments)
    assert not (tmp_path / "runs" / "bad").exists()


@pytest.mark.parametrize("case", FILES)
def test_bad_file(run: Run, case: str, tmp_path: Path) -> None:
    text, message = FILES[case]
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    assert message in run("train", file)
    assert not (tmp_path / "runs").exists()


def test_a_name_that_exists(run: Run, tmp_path: Path) -> None:
    (tmp_path / "runs" / "bad").mkdir(parents=True)
    (tmp_path / "runs" / "bad" / "config.yaml").touch()
    message = run("train", QUICKSTART)
    assert "run bad exists in" in message
    assert "write --resume to continue it, or another name" in message


def test_a_second_driver(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = load_config(QUICKSTART, [f"storage={tmp_path}/runs", "name=bad", "search=null"])
    monkeypatch.chdir(ROOT)
    with open_run(resolve(written), resume=False):
        assert "is driven by another process" in run("train", QUICKSTART, "--resume")


def test_a_resume_that_changes_the_math(run: Run, tmp_path: Path) -> None:
    written = load_config(QUICKSTART, [f"storage={tmp_path}/runs", "name=bad", "search=null"])
    with open_run(resolve(written), resume=False):
        pass
    message = run("train", QUICKSTART, "--resume", "train.batch_size=4")
    assert "train.batch_size=4 (the run has 16)" in message


def test_a_resume_with_another_space(run: Run, tmp_path: Path) -> None:
    written = load_config(QUICKSTART, [f"storage={tmp_path}/runs", "name=bad"])
    with open_run(resolve(written), resume=False):
        pass
    other = "search.space.train.lr.log_uniform=[1e-5,1e-4]"
    message = run("sweep", QUICKSTART, "--resume", other)
    assert (
        "search.space.train.lr.log_uniform=[1e-05, 0.0001] (the run has [0.0003, 0.01])" in message
    )


def test_no_storage_that_outlives_a_job(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv("RAYTUNE_FT_STORAGE", raising=False)
    message = run("sweep", QUICKSTART, "storage=runs")
    assert "write a path that every node reaches, or set RAYTUNE_FT_STORAGE to one" in message


@pytest.mark.ray
@pytest.mark.parametrize("command", ["train", pytest.param("sweep", marks=pytest.mark.slow)])
def test_more_workers_than_the_cluster_has(command: str, tmp_path: Path) -> None:
    arguments = ["parallel.workers=512", "train.batch_size=512", f"storage={tmp_path}/runs"]
    if command == "sweep":
        arguments += ["search.space.train.batch_size=null"]
    done = _subprocess("-m", "raytune_ft", command, str(QUICKSTART), "name=bad", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: parallel.workers=512 with {CPU: 1} each needs 512 CPU;")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs" / "bad").exists()


def test_a_hub_id_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = ["model.path=nobody/no-such-model", f"storage={tmp_path}/runs"]
    done = _subprocess("-m", "raytune_ft", "train", str(QUICKSTART), *model)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: model.path=nobody/no-such-model cannot be read")
    assert "without a network: download it elsewhere" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("job", ["train", "sweep"])
def test_the_entry_points_of_jobs_say_the_same(job: str) -> None:
    done = _subprocess(f"jobs/{job}.py", str(QUICKSTART), "train.lrr=1")
    assert done.returncode == 2
    assert done.stderr == "error: train.lrr is not a key; did you mean train.lr?\n"
    done = _subprocess("jobs/promote.py", "nowhere")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def _subprocess(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
