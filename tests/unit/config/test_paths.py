"""What is a file of this machine and what is on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.config import paths

HUB = [
    "openai/gsm8k",
    "owner/name-v2_x",
    "teknium/OpenHermes-2.5",
    "Qwen/Qwen2.5-0.5B",
    "owner/name.v2",
]
LOCAL = [
    "data/train.jsonl",
    "data/TRAIN.JSONL",
    "train.parquet",
    "./owner/name",
    "../train",
    "~/train",
    "/data/train",
]
NEITHER = ["gsm8k", "a/b/c", "-a/b"]


@pytest.mark.parametrize("path", HUB)
def test_hub_ids_stay_as_they_are(tmp_path: Path, path: str) -> None:
    assert paths.is_hub_id(path)
    assert paths.source(path, tmp_path, "data.train.path") == path
    assert paths.model(path, tmp_path) == path


@pytest.mark.parametrize("path", LOCAL)
def test_files_become_absolute(tmp_path: Path, path: str) -> None:
    assert not paths.is_hub_id(path)
    assert Path(paths.source(path, tmp_path, "data.train.path")).is_absolute()
    assert Path(paths.model(path, tmp_path)).is_absolute()


@pytest.mark.parametrize("path", NEITHER)
def test_what_is_neither_is_left_to_be_refused(tmp_path: Path, path: str) -> None:
    assert not paths.is_hub_id(path)
    assert paths.source(path, tmp_path, "data.train.path") == path


@pytest.mark.parametrize("path", [*HUB, *NEITHER])
def test_what_exists_is_a_file(tmp_path: Path, path: str) -> None:
    (tmp_path / path).mkdir(parents=True)
    assert paths.source(path, tmp_path, "data.train.path") == str(tmp_path / path)
    assert paths.model(path, tmp_path) == str(tmp_path / path)


def test_a_variable_may_hold_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(tmp_path))
    assert paths.source("${DATA}/train", Path("/elsewhere"), "data.train.path") == "${DATA}/train"


def test_builtin_models_stay(tmp_path: Path) -> None:
    assert paths.model("builtin:tiny", tmp_path) == "builtin:tiny"
