"""A small run that really learned something, made once."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from raytune_ft.config.load import dump_yaml, load_config
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.model.load import load_tokenizer
from raytune_ft.rundir import RunSpec, cache_path, run_path
from raytune_ft.train.report import Silent
from raytune_ft.train.run import run_training
from tests.support.models import save_tiny_llama

TRAIN, TEST = 240, 30
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def write_rows(path: Path, count: int, seed: int) -> None:
    """Say a letter twice."""
    draw = random.Random(seed)
    words = [draw.choice("abcdefgh") for _ in range(count)]
    rows = [{"prompt": f"say {word}", "completion": word * 2} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, train.jsonl, test.jsonl."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(folder / "base")
    tokenizer_config = folder / "base" / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text()) | {"chat_template": TEMPLATE}
    tokenizer_config.write_text(json.dumps(settings))
    write_rows(folder / "train.jsonl", TRAIN, 0)
    write_rows(folder / "test.jsonl", TEST, 1)
    return folder


Train = Callable[..., Path]


def train_as(file: Path, name: str, *overrides: str) -> Path:
    """Train a run of that name as a config file says, with overrides; its directory."""
    config = resolve(load_config(file, [f"name={name}", *overrides]))
    path = run_path(config)
    path.mkdir()
    (path / "config.yaml").write_text(dump_yaml(config))
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config.data, tokenizer, config.seed, cache_path(config))
    (path / "data.json").write_text(data.report.to_json())
    result = run_training(RunSpec(config, path, data.path), "single", Silent())
    assert result.status == "completed"
    return path


@pytest.fixture(scope="session")
def train(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train a run of that name with overrides; its directory."""
    storage = tmp_path_factory.mktemp("runs")
    file = inputs / "config.yaml"
    file.write_text(
        f"""
        name: some
        storage: {storage}
        model: {{path: {inputs}/base}}
        method: {{name: lora, rank: 4, alpha: 8}}
        data:
          train: {{path: {inputs}/train.jsonl}}
          validation: 0.1
          test: {{path: {inputs}/test.jsonl}}
        train: {{batch_size: 8, lr: 1e-2, epochs: 3, eval_every_examples: 100, precision: float32}}
        promote: {{max_overlap: 1.0}}  # there are eight letters
        """
    )

    return partial(train_as, file)


@pytest.fixture(scope="session")
def trained(train: Train) -> Path:
    """A LoRA run whose model is much better than its base."""
    return train("trained")


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, which has also moved to another place."""
    return Path(shutil.copytree(trained, tmp_path / "moved" / "trained"))


def config_of(run: Path) -> Config:
    """Its own config."""
    return load_config(run / "config.yaml")
