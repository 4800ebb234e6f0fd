"""A name is used once, by one driver at a time, and files are replaced whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.data import DataConfig, SourceConfig
from raytune_ft.config.load import apply_overrides, load_config
from raytune_ft.config.schema import Config
from raytune_ft.errors import ClusterError, ConfigError, InputError, StorageError
from raytune_ft.files import write_json_atomic
from raytune_ft.rundir import open_run, probe_storage, run_path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    source = SourceConfig(path="/x.jsonl")
    return Config(name="a", storage=str(tmp_path / "runs"), data=DataConfig(train=source))


def test_a_new_run_leaves_its_config_and_its_name_is_used_up(config: Config) -> None:
    with open_run(config, resume=False) as run:
        assert load_config(run.path / "config.yaml") == config
        assert run.saved is None
        (run.path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(StorageError, match="write --resume to continue it, or another name"):
        open_run(config, resume=False).__enter__()
    with open_run(config, resume=True) as again:
        assert again.path == run.path
        assert again.saved == config


def test_resume_wants_a_run(config: Config) -> None:
    with pytest.raises(StorageError, match="holds no run to resume"):
        open_run(config, resume=True).__enter__()
    assert not run_path(config).exists()


def test_resume_checks_what_changed(config: Config) -> None:
    with open_run(config, resume=False):
        pass
    other = apply_overrides(config, {"train.lr": 1.0})
    with pytest.raises(ConfigError, match=r"train\.lr=1\.0 \(the run has 0\.0002\)"):
        open_run(other, resume=True).__enter__()


def test_a_mistake_before_anything_was_measured_does_not_use_up_the_name(config: Config) -> None:
    with pytest.raises(ConfigError), open_run(config, resume=False):
        raise ConfigError("a", "b", "c")
    assert not run_path(config).exists()


def test_trials_that_were_measured_are_kept_when_the_promotion_is_refused(config: Config) -> None:
    trial = run_path(config) / "trials" / "trial-000"

    def measure_and_fail() -> None:
        trial.mkdir(parents=True)
        (trial / "metrics.jsonl").touch()
        raise StorageError("disk", "is full", "make room")

    with pytest.raises(StorageError, match="disk"), open_run(config, resume=False):
        measure_and_fail()
    assert (trial / "metrics.jsonl").exists()


def test_files_of_somebody_else_are_not_a_new_run(config: Config) -> None:
    run_path(config).mkdir(parents=True)
    (run_path(config) / "thesis.txt").touch()
    with pytest.raises(StorageError, match="exists"):
        open_run(config, resume=False).__enter__()


@pytest.mark.parametrize("name", [".git", ".env", "thesis.txt"])
def test_a_directory_that_holds_anything_is_not_taken_and_not_removed(
    config: Config, name: str
) -> None:
    run_path(config).mkdir(parents=True)
    (run_path(config) / name).write_text("dear")
    with pytest.raises(StorageError, match="exists"), open_run(config, resume=False):
        raise ConfigError("a", "b", "c")
    assert [path.name for path in run_path(config).iterdir()] == [name]


def test_an_empty_directory_is_taken_and_given_back(config: Config) -> None:
    run_path(config).mkdir(parents=True)

    def make_and_fail(path: Path) -> None:
        (path / "checkpoints").mkdir()
        raise ConfigError("a", "b", "c")

    with pytest.raises(ConfigError), open_run(config, resume=False) as run:
        make_and_fail(run.path)
    assert {path.name for path in run_path(config).iterdir()} <= {".lock"}
    with open_run(config, resume=False):
        pass


def test_a_driver_killed_before_its_config_was_whole_does_not_use_up_the_name(
    config: Config,
) -> None:
    run_path(config).mkdir(parents=True)
    (run_path(config) / ".lock").touch()
    (run_path(config) / ".config.yaml.123").touch()
    with open_run(config, resume=False) as run:
        assert (run.path / "config.yaml").is_file()


@pytest.mark.parametrize("left", ["train", "sweep"])
def test_a_driver_killed_before_anything_was_measured_does_not_use_up_the_name(
    config: Config, left: str
) -> None:
    """It had its config, its data report and, in a sweep, its study and trials without metrics."""
    path = run_path(config)
    with open_run(config, resume=False):
        (path / "data.json").write_text("{}")
        (path / "checkpoints").mkdir()
        if left == "sweep":
            (path / "study.db").touch()
            (path / "study.db-journal").touch()
            (path / ".data.json.123").touch()
            (path / "trials" / "trial-000").mkdir(parents=True)
    with open_run(config, resume=True) as again:  # either command goes on
        assert again.saved == config
    other = apply_overrides(config, {"train.lr": 1.0})
    with open_run(other, resume=False) as run:
        assert {each.name for each in path.iterdir()} == {".lock", "config.yaml"}
        assert run.saved is None
        with pytest.raises(StorageError, match="is driven by another process"):
            open_run(other, resume=False).__enter__()


@pytest.mark.parametrize("name", ["result.json", "promoted/model", "trials/t/metrics.jsonl"])
def test_what_was_measured_or_ended_uses_up_the_name(config: Config, name: str) -> None:
    with open_run(config, resume=False) as run:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).touch()
    with pytest.raises(StorageError, match="exists"):
        open_run(config, resume=False).__enter__()
    assert (run_path(config) / name).exists()


def test_a_config_that_no_driver_wrote_is_kept(config: Config) -> None:
    run_path(config).mkdir(parents=True)
    (run_path(config) / "config.yaml").write_text("mine")
    with pytest.raises(StorageError, match="exists"):
        open_run(config, resume=False).__enter__()
    assert (run_path(config) / "config.yaml").read_text() == "mine"


def test_auto_begins_and_continues(config: Config) -> None:
    with open_run(config, "auto") as run:
        assert run.saved is None
        (run.path / "metrics.jsonl").write_text("{}\n")
    with open_run(config, "auto") as again:
        assert again.saved == config
        assert (again.path / "metrics.jsonl").read_text() == "{}\n"
    other = apply_overrides(config, {"train.lr": 1.0})
    with pytest.raises(ConfigError, match=r"train\.lr=1\.0 \(the run has 0\.0002\)"):
        open_run(other, "auto").__enter__()


def test_auto_keeps_a_study_of_the_same_sweep_and_begins_one_with_another_config(
    config: Config,
) -> None:
    """Nothing was measured: the driver was killed while workers started."""
    path = run_path(config)
    with open_run(config, "auto"):
        (path / "study.db").touch()
    with open_run(config, "auto") as again:
        assert again.saved == config
        assert (path / "study.db").exists()
    other = apply_overrides(config, {"train.lr": 1.0})
    with open_run(other, "auto") as new:
        assert new.saved is None
        assert {each.name for each in path.iterdir()} == {".lock", "config.yaml"}


@pytest.mark.parametrize("files", [["thesis.txt"], ["config.yaml"], [".lock", "thesis.txt"]])
def test_auto_takes_no_directory_that_a_driver_did_not_make(
    config: Config, files: list[str]
) -> None:
    path = run_path(config)
    path.mkdir(parents=True)
    for name in files:
        (path / name).write_text("mine")
    for _ in range(2):
        with pytest.raises(InputError):
            open_run(config, "auto").__enter__()
    assert [(path / name).read_text() for name in files] == ["mine"] * len(files)


def test_auto_goes_on_after_a_kill_at_any_change_of_the_directory(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [math.inf]

    def may_die(function: Any) -> Any:
        def change(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:  # the dead change nothing more
                raise KeyboardInterrupt
            return function(*arguments, **keywords)

        return change

    for name in ("mkdir", "unlink", "replace", "open"):
        monkeypatch.setattr(Path, name, may_die(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", may_die(shutil.rmtree))

    def begin(own: Config) -> None:
        with open_run(own, "auto") as run, run.begun(own):
            pass

    left[0] = 1000
    begin(config)
    changes = 1000 - int(left[0])
    assert changes > 5
    for number in range(changes):
        own = apply_overrides(config, {"name": f"killed-{number}"})
        left[0] = number
        with pytest.raises(KeyboardInterrupt):
            begin(own)
        left[0] = math.inf
        with open_run(own, "auto") as run, run.begun(own):
            assert load_config(run.path / "config.yaml") == own
            (run.path / "metrics.jsonl").write_text("{}\n")
        with open_run(own, "auto") as again:
            assert again.saved == own


def begin_and_end(config: Config) -> Config:
    """A run that is complete, and its config with a larger budget."""
    old = apply_overrides(config, {"train.max_examples": 80, "train.lr_schedule": "constant"})
    with open_run(old, resume=False) as run, run.begun(old):
        (run.path / "metrics.jsonl").write_text("{}\n")
        write_json_atomic(run.path / "result.json", {"status": "completed"})
    return apply_overrides(old, {"train.max_examples": 160})


@pytest.mark.parametrize("calls", range(1, 6))
def test_no_kill_leaves_a_result_beside_a_larger_budget(
    config: Config, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Killed at each change of the directory in turn, from opening the run on."""
    more = begin_and_end(config)
    path = run_path(more)
    left = [calls]

    def may_die(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt  # no handler of ours: nothing is put back
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(Path, "unlink", may_die(Path.unlink))
    monkeypatch.setattr(Path, "replace", may_die(Path.replace))
    with (
        pytest.raises(KeyboardInterrupt),
        open_run(more, resume=True) as run,
        run.begun(more),
    ):
        raise KeyboardInterrupt
    assert not (path / "result.json").exists() or (
        load_config(path / "config.yaml").train.max_examples == 80
    )


def test_a_mistake_in_a_resume_puts_back_what_was(config: Config) -> None:
    more = begin_and_end(config)
    path = run_path(more)
    before = [(path / name).read_text() for name in ("config.yaml", "result.json")]

    def fail(error: InputError, metrics: str = "") -> None:
        with open_run(more, resume=True) as run, run.begun(more):
            assert load_config(path / "config.yaml") == more
            assert not (path / "result.json").exists()
            write_json_atomic(path / "result.json", {"status": "failed"})
            with (path / "metrics.jsonl").open("a") as file:
                file.write(metrics)
            raise error

    with pytest.raises(ClusterError):
        fail(ClusterError("a", "b", "c"))
    assert [(path / name).read_text() for name in ("config.yaml", "result.json")] == before
    with pytest.raises(StorageError):
        fail(StorageError("disk", "is full", "make room"), "{}\n")
    assert load_config(path / "config.yaml") == more
    assert json.loads((path / "result.json").read_text()) == {"status": "failed"}


def test_a_second_driver_is_refused_until_the_first_is_dead(config: Config) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from raytune_ft.config.load import load_config; from raytune_ft.rundir import open_run\n"
        "with open_run(load_config(Path(sys.argv[1])), resume=True):\n"
        "    print('locked', flush=True); time.sleep(60)\n"
    )
    with open_run(config, resume=False) as run:
        pass
    driver = subprocess.Popen(
        [sys.executable, "-c", code, run.path / "config.yaml"], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "locked\n"
    with pytest.raises(StorageError, match="is driven by another process"):
        open_run(config, resume=True).__enter__()
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    with open_run(config, resume=True):
        pass


@pytest.mark.parametrize("storage", ["/proc/raytune", "/dev/null/x", "a\0b"])
def test_storage_that_cannot_be_written_is_refused(storage: str) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        probe_storage(Path(storage))


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json_atomic(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": None}
    write_json_atomic(path, {"loss": 1.0})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert os.listdir(tmp_path) == ["result.json"]
