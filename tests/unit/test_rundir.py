"""A name is used once, by one driver at a time, and files are replaced whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_ft.config.load import apply_overrides, load_config
from raytune_ft.config.schema import Config, DataConfig, SourceConfig
from raytune_ft.errors import ConfigError, StorageError
from raytune_ft.rundir import open_run, probe_storage, run_path, write_json_atomic


@pytest.fixture
def config(tmp_path: Path) -> Config:
    source = SourceConfig(path="/x.jsonl")
    return Config(name="a", storage=str(tmp_path / "runs"), data=DataConfig(train=source))


def test_a_new_run_leaves_its_config_and_its_name_is_used_up(config: Config) -> None:
    with open_run(config, resume=False) as run:
        assert load_config(run.path / "config.yaml") == config
        assert run.saved is None
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
