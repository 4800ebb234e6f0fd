"""What the commands decide from a run directory, with training and search replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune_ft import app
from raytune_ft.cli import run_command
from raytune_ft.config.load import load_config
from raytune_ft.errors import ClusterError, ConfigError
from raytune_ft.files import write_json_atomic
from raytune_ft.records import Point, RunResult
from raytune_ft.train.spec import RunSpec
from tests.support.runs import make_inputs, write_rows

Command = Callable[..., int]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """model, rows.jsonl and test.jsonl."""
    make_inputs(tmp_path, examples=40)
    write_rows(tmp_path / "test.jsonl", 10, seed=1)
    return tmp_path


@pytest.fixture
def command(inputs: Path) -> Command:
    """Runs a command on a config for the inputs; its exit code."""
    file = inputs / "config.yaml"
    file.write_text(
        f"""
        name: a
        storage: {inputs}/runs
        model: {{path: {inputs}/model}}
        method: {{rank: 2}}
        data: {{train: {{path: {inputs}/rows.jsonl}}, test: {{path: {inputs}/test.jsonl}}}}
        train: {{lr_schedule: constant, max_examples: 80}}
        search: {{trials: 2, scheduler: null, space: {{train.lr: {{choice: [1e-3, 1e-4]}}}}}}
        """
    )
    return lambda name, *arguments: run_command([name, str(file), *arguments])


@pytest.fixture
def run_dir(inputs: Path) -> Path:
    return inputs / "runs" / "a"


class Work:
    """Stands for training and for search: does all of it, or raises `error`."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.done: list[int | None] = []

    def train(self, spec: RunSpec, *_: object) -> RunResult:
        self._work(spec, spec.config.train.max_examples)
        point = Point(1, spec.config.train.max_examples or 0, 1.0, 0.0, 0.0)
        result = RunResult("completed", None, point, point, 0, "sha")
        write_json_atomic(spec.run_dir / "result.json", result)
        return result

    def search(self, spec: RunSpec, *_: object) -> None:
        assert spec.config.search is not None
        self._work(spec, spec.config.search.trials)
        content = {"status": "completed", "best": None, "trials": []}
        write_json_atomic(spec.run_dir / "result.json", content)

    def _work(self, spec: RunSpec, amount: int | None) -> None:
        if self.error is not None:
            raise self.error
        with (spec.run_dir / "metrics.jsonl").open("a") as file:
            file.write("{}\n")
        self.done.append(amount)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    work = Work()
    monkeypatch.setattr(app, "_run", work.train)
    monkeypatch.setattr(app, "_search", work.search)
    monkeypatch.setattr(app, "_promote_once", lambda *_: None)
    return work


@pytest.mark.parametrize(
    ("name", "more"), [("train", "train.max_examples"), ("sweep", "search.trials")]
)
def test_a_larger_budget_that_was_not_trained_is_not_complete(
    command: Command,
    work: Work,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    more: str,
) -> None:
    assert command(name) == 0
    assert command(name, "--resume") == 0

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(app, "prepare", killed)
        assert command(name, f"{more}=160", "--resume") == 130
    work.error = KeyboardInterrupt()  # the next resume gets as far as the work
    assert command(name, f"{more}=160", "--resume") == 130
    assert not (run_dir / "result.json").exists()
    work.error = None
    assert command(name, f"{more}=160", "--resume") == 0
    assert command(name, f"{more}=160", "--resume") == 0
    assert work.done == [{"train": 80, "sweep": 2}[name], 160]


@pytest.mark.parametrize(
    ("name", "more"), [("train", "train.max_examples"), ("sweep", "search.trials")]
)
def test_a_larger_budget_that_was_refused_changes_nothing(
    command: Command, work: Work, run_dir: Path, name: str, more: str
) -> None:
    assert command(name) == 0
    before = (run_dir / "result.json").read_text(), (run_dir / "config.yaml").read_text()
    work.error = ClusterError("parallel.workers=512", "is more than there is", "write 2")
    assert command(name, f"{more}=160", "--resume") == 2
    after = (run_dir / "result.json").read_text(), (run_dir / "config.yaml").read_text()
    assert after == before


def test_what_only_workers_find_wrong_does_not_use_up_the_name(
    command: Command,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fit(spec: RunSpec, *_: Any) -> RunResult:
        write_json_atomic(spec.run_dir / "result.json", {"status": "failed"})
        (spec.run_dir / "checkpoints").mkdir()
        raise ConfigError("data.packing=true", "would change the numbers", "write auto")

    monkeypatch.setattr("raytune_ft.ray_backend.run_handle.fit", fit)
    assert command("train", "data.packing=true", "parallel.workers=2") == 2
    assert capsys.readouterr().err == (
        "error: data.packing=true would change the numbers; write auto\n"
    )
    assert not run_dir.exists()


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_a_resume_keeps_what_auto_chose_by_memory(
    command: Command, work: Work, run_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def strategy(lack: str | None, *arguments: str) -> str:
        monkeypatch.setattr(app, "_shortage", lambda *_: lack)
        assert command(name, *arguments) == 0
        return load_config(run_dir / "config.yaml").parallel.strategy

    more = "train.max_examples" if name == "train" else "search.trials"
    first = strategy("a whole copy is too large", "parallel.workers=2")
    assert first == "fsdp"
    assert strategy(None, "parallel.workers=2", f"{more}=160", "--resume") == "fsdp"
    assert strategy(None, "parallel.workers=4", f"{more}=240", "--resume") == "ddp"
    written = ("parallel.workers=4", "parallel.strategy=fsdp", f"{more}=320", "--resume")
    assert strategy(None, *written) == "fsdp"


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_a_resume_on_other_data_is_refused(
    command: Command,
    work: Work,
    inputs: Path,
    run_dir: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    assert command(name) == 0
    (run_dir / "result.json").unlink()  # as if it had been killed
    rows = inputs / "rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([lines[1], lines[0], *lines[2:]]))
    assert command(name, "--resume") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.train with 38 examples (sha256 ")
    assert "is not what the run began with, 38 examples (sha256 " in error
    assert len(work.done) == 1

    rows.write_text("".join(lines))
    shutil.rmtree(inputs / "runs" / ".cache")  # the same rows, tokenised anew
    assert command(name, "--resume") == 0
    assert len(work.done) == 2


def test_data_may_be_mended_before_anything_was_measured(
    command: Command, work: Work, inputs: Path, run_dir: Path
) -> None:
    assert command("train") == 0
    (run_dir / "result.json").unlink()
    (run_dir / "metrics.jsonl").unlink()
    write_rows(inputs / "rows.jsonl", 20, seed=3)
    assert command("train", "--resume") == 0
    report = json.loads((run_dir / "data.json").read_text())
    assert report["splits"]["train"]["examples"] == 19
