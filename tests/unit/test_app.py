"""What the commands decide from a run directory, with training and search replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from raytune_ft import app
from raytune_ft.config.identity import config_sha256
from raytune_ft.config.load import load_config
from raytune_ft.config.schema import Config
from raytune_ft.config.trust import Code
from raytune_ft.errors import ClusterError, ConfigError, DataError, StorageError
from raytune_ft.estimate.hardware import PROCESS, USABLE_RAM
from raytune_ft.files import write_json_atomic
from raytune_ft.plan.make import make_plan
from raytune_ft.plan.text import describe
from raytune_ft.preflight import Tell
from raytune_ft.records import Point, RunResult
from raytune_ft.rundir import Layout, Resume, RunSpec
from raytune_ft.train.report import Silent
from tests.support.runs import write_rows

pytestmark = pytest.mark.usefixtures("traced_once")
Command = Callable[..., None]
ROOMY, TIGHT = 2**50, 2**20
"""Bytes of a worker: a copy of the model fits, or does not."""


class Work(app.Backend):
    """Stands for training and for search: does all of it, or raises `error`."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.done: list[int | None] = []
        self.specs: list[RunSpec] = []

    def starting(self, config: Config) -> AbstractContextManager[None]:
        """Nothing starts."""
        return nullcontext()

    def train(self, spec: RunSpec, *_: object) -> RunResult:
        self._work(spec, spec.config.train.max_examples)
        point = Point(1, spec.config.train.max_examples or 0, {"eval_loss": 1.0})
        result = RunResult("completed", None, point, point, 0, "sha")
        write_json_atomic(spec.run_dir / "result.json", result)
        return result

    def search(self, spec: RunSpec, *_: object) -> None:
        assert spec.config.search is not None
        self._work(spec, spec.config.search.trials)
        content = {"status": "completed", "best": None, "trials": []}
        write_json_atomic(spec.run_dir / "result.json", content)

    def promote(  # type: ignore[override]
        self, path: Path, tell: Tell, code: Code, wait_s: float | None
    ) -> None:
        """Nothing was trained."""
        self.code = code

    def _work(self, spec: RunSpec, amount: int | None) -> None:
        self.specs.append(spec)
        if self.error is not None:
            raise self.error
        with (spec.run_dir / "metrics.jsonl").open("a") as file:
            file.write("{}\n")
        self.done.append(amount)


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """rows.jsonl and test.jsonl."""
    write_rows(tmp_path / "rows.jsonl", 40)
    write_rows(tmp_path / "test.jsonl", 10, seed=1)
    return tmp_path


@pytest.fixture
def command(inputs: Path, work: Work) -> Command:
    """Runs `train` or `sweep` on a config for the inputs."""
    file = inputs / "config.yaml"
    file.write_text(
        f"""
        name: a
        storage: {inputs}/runs
        model: {{path: builtin:tiny}}
        method: {{rank: 2}}
        data: {{train: {{path: {inputs}/rows.jsonl}}, test: {{path: {inputs}/test.jsonl}}}}
        train: {{lr_schedule: constant, max_examples: 80}}
        search: {{trials: 2, scheduler: null, space: {{train.lr: {{choice: [1e-3, 1e-4]}}}}}}
        """
    )

    def command(
        name: str,
        *overrides: str,
        resume: Resume = False,
        tell: Tell = lambda line: None,
        usable: int | None = ROOMY,
        backend: app.Backend = work,
    ) -> None:
        if name == "train":
            app.train(file, overrides, resume, tell, lambda total: Silent(), backend, usable)
        else:
            app.sweep(file, overrides, resume, tell, backend, usable)

    return command


@pytest.fixture
def run_dir(inputs: Path) -> Path:
    return inputs / "runs" / "a"


MORE = pytest.mark.parametrize(
    ("name", "more"), [("train", "train.max_examples"), ("sweep", "search.trials")]
)


@MORE
def test_a_larger_budget_that_was_not_trained_is_not_complete(
    command: Command, work: Work, run_dir: Path, name: str, more: str
) -> None:
    command(name)
    command(name, resume=True)

    def killed_while_preparing(line: str) -> None:
        if line.startswith("data:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command(name, f"{more}=160", resume=True, tell=killed_while_preparing)
    work.error = KeyboardInterrupt()  # the next resume gets as far as the work
    with pytest.raises(KeyboardInterrupt):
        command(name, f"{more}=160", resume=True)
    assert not (run_dir / "result.json").exists()
    work.error = None
    command(name, f"{more}=160", resume=True)
    command(name, f"{more}=160", resume=True)
    assert work.done == [{"train": 80, "sweep": 2}[name], 160]


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_the_same_command_begins_continues_and_is_done(
    command: Command, work: Work, run_dir: Path, name: str
) -> None:
    def killed_while_preparing(line: str) -> None:
        if line.startswith("data.train"):
            raise KeyboardInterrupt  # no handler of ours: nothing is put back

    with pytest.raises(KeyboardInterrupt):
        command(name, resume="auto", tell=killed_while_preparing)
    assert (run_dir / "config.yaml").is_file()
    work.error = KeyboardInterrupt()  # while the cluster starts
    with pytest.raises(KeyboardInterrupt):
        command(name, resume="auto")
    work.error = None
    for status in ("interrupted", "failed", "completed"):
        command(name, resume="auto")
        write_json_atomic(run_dir / "result.json", {"status": status})
    command(name, resume="auto")
    assert len(work.done) == 3
    with pytest.raises(ConfigError, match=r"train\.lr"):
        command(name, "train.lr=1.0", resume="auto")


@MORE
def test_a_larger_budget_that_was_refused_changes_nothing(
    command: Command, work: Work, run_dir: Path, name: str, more: str
) -> None:
    command(name)
    before = (run_dir / "result.json").read_text(), (run_dir / "config.yaml").read_text()
    work.error = ClusterError("parallel.workers=512", "is more than there is", "write 2")
    with pytest.raises(ClusterError):
        command(name, f"{more}=160", resume=True)
    after = (run_dir / "result.json").read_text(), (run_dir / "config.yaml").read_text()
    assert after == before


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_a_driver_killed_while_it_prepares_leaves_the_name_free(
    command: Command, work: Work, run_dir: Path, name: str
) -> None:
    def killed_while_preparing(line: str) -> None:
        if line.startswith("data.train"):
            raise KeyboardInterrupt  # no handler of ours: nothing is put back

    with pytest.raises(KeyboardInterrupt):
        command(name, tell=killed_while_preparing)
    assert (run_dir / "config.yaml").is_file()
    work.error = KeyboardInterrupt()  # while the cluster starts
    with pytest.raises(KeyboardInterrupt):
        command(name)
    assert (run_dir / "data.json").is_file()
    work.error = None
    command(name)
    assert len(work.done) == 1
    with pytest.raises(StorageError, match="exists"):
        command(name)


class Refused(Work):
    """Workers that start, leave files, and find a mistake in the config."""

    def train(self, spec: RunSpec, *_: object) -> RunResult:
        write_json_atomic(spec.run_dir / "result.json", {"status": "failed"})
        (spec.run_dir / "checkpoints").mkdir()
        raise ConfigError("data.packing=true", "would change the numbers", "write auto")


def test_what_only_workers_find_wrong_does_not_use_up_the_name(
    command: Command, run_dir: Path
) -> None:
    with pytest.raises(ConfigError, match=r"data\.packing=true"):
        command("train", "data.packing=true", "parallel.workers=2", backend=Refused())
    assert not run_dir.exists()


@pytest.mark.parametrize("name", ["train", pytest.param("sweep", marks=pytest.mark.slow)])
def test_a_resume_keeps_what_auto_chose_by_memory(
    command: Command, run_dir: Path, name: str
) -> None:
    def strategy(usable: int, *overrides: str, resume: bool = True) -> str:
        command(name, *overrides, resume=resume, usable=usable)
        return load_config(run_dir / "config.yaml").parallel.strategy

    more = "train.max_examples" if name == "train" else "search.trials"
    assert strategy(TIGHT, "parallel.workers=2", resume=False) == "fsdp"
    assert strategy(ROOMY, "parallel.workers=2", f"{more}=160") == "fsdp"
    assert strategy(ROOMY, "parallel.workers=4", f"{more}=240") == "ddp"
    written = ("parallel.workers=4", "parallel.strategy=fsdp", f"{more}=320")
    assert strategy(ROOMY, *written) == "fsdp"


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_a_resume_on_other_data_is_refused(
    command: Command, work: Work, inputs: Path, run_dir: Path, name: str
) -> None:
    command(name)
    (run_dir / "result.json").unlink()  # as if it had been killed
    rows = inputs / "rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(DataError, match=r"^data\.train .*38 examples.* began .*38 examples"):
        command(name, resume=True)
    assert len(work.done) == 1

    rows.write_text("".join(lines))
    shutil.rmtree(inputs / "runs" / ".cache")  # the same rows, tokenised anew
    command(name, resume=True)
    assert len(work.done) == 2


def test_data_may_be_mended_before_anything_was_measured(
    command: Command, inputs: Path, run_dir: Path
) -> None:
    command("train")
    (run_dir / "result.json").unlink()
    (run_dir / "metrics.jsonl").unlink()
    write_rows(inputs / "rows.jsonl", 20, seed=3)
    command("train", resume=True)
    report = json.loads((run_dir / "data.json").read_text())
    assert report["splits"]["train"]["examples"] == 19


def test_a_sweep_runs_the_code_that_its_command_names(
    command: Command, work: Work, inputs: Path, run_dir: Path
) -> None:
    for name in ("own", "saved"):
        (inputs / f"{name}.py").write_text("def score(prompt, reference, generated): return 1\n")
    command("sweep", f"promote.metrics=[loss, '{inputs}/own.py:score']")
    assert work.code == [f"promote.metrics={inputs}/own.py:score"]
    saved = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(saved.replace("/own.py:", "/saved.py:"))
    command("sweep", resume=True)  # nothing is left to train, and the saved config is promoted
    assert "/saved.py:" in (run_dir / "config.yaml").read_text()
    assert work.code == []


def test_the_passes_of_a_run_are_chosen_before_it_starts(
    command: Command, work: Work, run_dir: Path
) -> None:
    """`config.yaml` keeps `auto`, so that a resume elsewhere chooses again."""
    said: list[str] = []
    command("train", tell=said.append)
    assert any(
        line.startswith("passes of at most 2,048 tokens, activation checkpointing none: needs")
        for line in said
    )
    config = work.specs[-1].config
    assert (config.train.micro_tokens, config.parallel.activation_checkpointing) == (2048, "none")
    saved = load_config(run_dir / "config.yaml")
    assert (saved.train.micro_tokens, saved.parallel.activation_checkpointing) == ("auto", "auto")
    assert config_sha256(saved) == config_sha256(config)
    command("train", "train.max_examples=160", resume=True, usable=TIGHT, tell=said.append)
    assert "does not fit by the estimate" in said[-1]
    config = work.specs[-1].config
    assert (config.train.micro_tokens, config.parallel.activation_checkpointing) == (256, "full")


def test_those_of_a_sweep_are_chosen_once_for_each_method(command: Command, work: Work) -> None:
    command("sweep")
    assert work.specs[-1].layouts == {"lora": Layout(2048, "none")}
    space = '{"method.name": {"choice": ["lora", "full", "ia3"]}}'
    command("sweep", "name=b", f"search.space={space}", usable=TIGHT)
    layouts = work.specs[-1].layouts
    assert list(layouts) == ["ia3", "lora", "full"]  # by their trained weights
    assert set(layouts.values()) == {Layout(256, "full")}


def test_plan_and_the_run_choose_alike(
    command: Command, work: Work, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = int((PROCESS["cpu"] + 14 * 2**20) / USABLE_RAM)
    monkeypatch.setattr("raytune_ft.estimate.hardware.machine_memory", lambda: memory)
    said: list[str] = []
    command("train", "train.batch_size=64", usable=None, tell=said.append)
    overrides = ["name=b", "search=null", "train.batch_size=64"]
    plan = make_plan(inputs / "config.yaml", overrides, lambda line: None)
    (line,) = plan.passes
    assert line in said
    assert line in describe(plan)
    config = work.specs[-1].config
    chosen = (config.train.micro_tokens, config.parallel.activation_checkpointing)
    assert chosen != (2048, "none")
    assert plan.own.parallel.activation_checkpointing == chosen[1]
    assert plan.own.rejected is None
    assert plan.config.train.micro_tokens == "auto"
