"""What is packed, what is not, and what is refused before anything leaves this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.load import load_config, to_plain
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError
from raytune_ft.submit import package
from raytune_ft.submit.package import Package, named_paths, package_of

NAMED = {
    "rows/train.jsonl": '{"prompt": "a", "completion": "b"}\n',
    "rows/test.jsonl": '{"prompt": "c", "completion": "d"}\n',
    "own.py": "def score(): ...\n",
    "tasks/task.yaml": "task: own\ninclude: base.yaml\nprocess: !function helpers.process\n"
    "dataset_kwargs: {data_files: rows/test.jsonl}\n",
    "tasks/base.yaml": "output_type: generate_until\n",
    "tasks/helpers.py": "def process(): ...\n",
    "chat.jinja": "{{ messages }}",
    "ds.json": "{}",
    "model/config.json": "{}",
    "saved/train/data.arrow": "rows",
}
OTHERS = (
    ".env",
    "secret.pem",
    "rows/other.jsonl",
    "tasks/elsewhere.py",
    "model/.cache/token",
    "model/__pycache__/code.pyc",
    "runs/first/metrics.jsonl",
)
WRITTEN: dict[str, Any] = {
    "name": "packed",
    "model": {"path": "./model"},
    "data": {
        "train": [
            {"path": "rows/train.jsonl", "format": "messages", "chat_template": "chat.jinja"},
            {"path": "saved"},
            {"path": "openai/gsm8k"},
        ],
        "test": {"path": "rows/test.jsonl"},
    },
    "train": {"objective": "kd", "kd": {"teacher": "builtin:tiny"}},
    "parallel": {"deepspeed": "ds.json"},
    "promote": {
        "metrics": ["loss", "own.py:score", "lm_eval:tasks/task.yaml", "lm_eval:arc_easy"],
        "base": "Qwen/Qwen2.5-0.5B",
    },
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with all that a config can name, and with what it does not."""
    for name, text in {**NAMED, **dict.fromkeys(OTHERS, "not yours")}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "run.yaml").write_text("name: packed\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def packed(project: Path, file: str = "run.yaml", cluster_paths: bool = False, **data: Any) -> Any:
    written = {**WRITTEN, "data": {**WRITTEN["data"], **data}}
    return package_of(project / file, Config.model_validate(written), project, cluster_paths)


def test_the_files_that_a_config_names_and_no_others(project: Path) -> None:
    made = packed(project)
    assert set(made.files) == {"run.yaml", *NAMED}
    made.write(project / "package.zip")
    with zipfile.ZipFile(project / "package.zip") as archive:
        assert archive.read("own.py") == b"def score(): ...\n"
        assert not any(b"not yours" in archive.read(name) for name in archive.namelist())


def test_a_config_from_elsewhere_lies_at_the_top(project: Path, tmp_path_factory: Any) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "mine.yaml").write_text("name: packed\n")
    assert packed(project, str(other / "mine.yaml")).config == "mine.yaml"
    shutil.copy(other / "mine.yaml", other / "ds.json")
    with pytest.raises(ConfigError, match=r"deepspeed=ds\.json"):
        packed(project, str(other / "ds.json"))


def test_equal_files_give_an_equal_archive(project: Path) -> None:
    first = packed(project).write(project / "first.zip")
    for path in project.rglob("*"):
        os.utime(path, (1, 1))
    assert packed(project).write(project / "second.zip") == first
    (project / "own.py").write_text("def score(): return 1\n")
    assert packed(project).write(project / "third.zip") != first


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/data/train.jsonl", "--cluster-paths"),
        ("~/train.jsonl", "--cluster-paths"),
        ("${DATA}/train.jsonl", "--cluster-paths"),
        ("../train.jsonl", "only what is there is packed"),
        ("rows/../../train.jsonl", "only what is there is packed"),
        ("rows/trian.jsonl", "does not exist"),
    ],
)
def test_paths_that_the_cluster_would_not_see(project: Path, path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        packed(project, test={"path": path})
    assert caught.value.value == f"data.test.path={path}"


@pytest.mark.parametrize("path", ["/data/train.jsonl", "${DATA}/train.jsonl"])
def test_paths_of_the_cluster_are_left_alone(project: Path, path: str) -> None:
    made = packed(project, cluster_paths=True, test={"path": path})
    assert set(made.files) == {"run.yaml", *NAMED}  # test.jsonl is what the task names


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_a_file_that_git_ignores_is_named(project: Path) -> None:
    (project / ".gitignore").write_text("*.pyc\nrows/\n*.json\n!*.json\n")
    packed(project)  # no repository yet
    subprocess.run(["git", "init", "-q"], check=True)
    with pytest.raises(ConfigError, match=r"\.gitignore:2") as caught:
        packed(project)
    assert "rows/test.jsonl" in caught.value.value or "rows/train.jsonl" in caught.value.value
    subprocess.run(["git", "add", "-f", "rows/train.jsonl", "rows/test.jsonl"], check=True)
    packed(project)


def test_a_large_package_names_its_largest_files(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "LIMIT", 4096)
    (project / "rows" / "train.jsonl").write_bytes(b"x" * 5000)
    (project / "model" / "model.safetensors").write_bytes(b"x" * 3000)
    with pytest.raises(ConfigError) as caught:
        packed(project)
    rule = caught.value.rule
    assert rule.index("rows/train.jsonl (4.9 KiB)") < rule.index("model/model.safetensors")
    assert "--cluster-paths" in caught.value.remedy


def test_every_path_that_is_resolved_is_known_here(project: Path) -> None:
    """A new key with a path would be neither packed nor refused."""
    (project / "whole.yaml").write_text(
        "name: whole\nmodel: {path: ./model}\nmethod: {name: full}\n"
        "data:\n  train: {path: rows/train.jsonl}\n  test: {path: rows/test.jsonl}\n"
        "parallel: {strategy: deepspeed, deepspeed: ds.json, workers: 2}\n"
        "search: {space: {train.lr: {choice: [1e-4]}}, warm_start: [runs/first]}\n"
        "promote:\n  metrics: [loss, 'own.py:score', 'lm_eval:tasks/task.yaml']\n"
        "  base: ./model\n  retention: {path: rows/test.jsonl}\n"
        "rewards: ['own.py:score', {name: model, path: ./rm}]\n"
    )
    config = load_config(project / "whole.yaml")
    known = {os.path.normpath(project / named.path) for named in named_paths(config)}
    resolved = _texts({**to_plain(resolve(config)), "storage": None})
    absolute = {text for text in resolved if str(project) in text}
    assert len(absolute) >= 8
    assert {text.removeprefix("lm_eval:").removesuffix(":score") for text in absolute} <= known


def _texts(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {text for item in value.values() for text in _texts(item)}
    if isinstance(value, list):
        return {text for item in value for text in _texts(item)}
    return {value} if isinstance(value, str) else set()


def test_sizes_are_summed(project: Path) -> None:
    made = Package("run.yaml", {"run.yaml": project / "run.yaml", "own.py": project / "own.py"})
    assert made.bytes == len("name: packed\n") + len(NAMED["own.py"])
