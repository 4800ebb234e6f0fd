"""Classifiers become plain model directories, and are held against a constant answer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import safe_open
from scipy.stats import pearsonr
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import f1_score, log_loss, mean_squared_error, r2_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raytune_ft.config.load import dump_yaml, load_config
from raytune_ft.config.resolve import resolve
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError, ModelError
from raytune_ft.model.build import load_tokenizer
from raytune_ft.model.heads import Head
from raytune_ft.promote.classifier import constant_scores, scores_of
from raytune_ft.promote.evaluate import evaluate_directory
from raytune_ft.promote.promote import promote
from raytune_ft.report.write import write_report
from raytune_ft.rundir import cache_path, run_path
from raytune_ft.train.report import Silent
from raytune_ft.train.run import run_training
from raytune_ft.train.spec import RunSpec
from tests.support.models import save_tiny_encoder, save_tiny_llama

TEXTS = ["a bad cad", "dad", "fed a bee, he did", "gag"]
Run = Callable[..., Path]


def write_rows(path: Path, count: int, seed: int) -> None:
    """Which of three letters a text has most of; and how many it has."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice("aabc")
        text = "".join(draw.choices("defgh ", k=draw.randint(3, 12))) + label * 4
        rows.append({"text": text, "label": label, "numbers": [len(text) / 10.0]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """encoder/, decoder/ (a language model), train.jsonl, test.jsonl."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_encoder(folder / "encoder")
    save_tiny_llama(folder / "decoder", tied=True)
    write_rows(folder / "train.jsonl", 200, 0)
    write_rows(folder / "test.jsonl", 40, 1)
    return folder


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Run:
    """Train a classifier with overrides; its directory."""
    file = tmp_path / "config.yaml"
    file.write_text(
        f"""
        name: some
        storage: {tmp_path}
        model: {{path: {root}/encoder}}
        method: {{name: lora, rank: 4, alpha: 8}}
        data:
          train: {{path: {root}/train.jsonl, format: classification}}
          validation: 0.2
          test: {{path: {root}/test.jsonl, format: classification}}
        train:
          {{objective: classification, batch_size: 8, lr: 1e-2, epochs: 2,
            eval_every_examples: 80, precision: float32}}
        promote: {{max_overlap: 1.0}}
        """
    )

    def train(name: str, *overrides: str) -> Path:
        config = resolve(load_config(file, [f"name={name}", *overrides]))
        path = run_path(config)
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(dump_yaml(config))
        tokenizer = load_tokenizer(config.model)
        data = prepare_data(config.data, tokenizer, config.seed, cache_path(config))
        (path / "data.json").write_text(data.report.to_json())
        result = run_training(RunSpec(config, path, data.path), "single", Silent())
        assert result.status == "completed"
        return path

    return train


def best(run_dir: Path) -> Path:
    return run_dir / str(json.loads((run_dir / "result.json").read_text())["best"]["checkpoint"])


def logits(model: Any, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**given).logits
    return found


def tensors(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("encoder", ["method.name=lora"]),
        ("decoder", ["method.name=lora"]),
        ("encoder", ["method.name=oft", "method.block_size=4"]),
        ("encoder", ["method.name=full", "train.lr=3e-3"]),
        ("decoder", ["method.name=freeze", "method.last=1", "train.lr=3e-3"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].partition("=")[2],
)
def test_a_promoted_classifier_is_base_and_adapter(
    run: Run, root: Path, model: str, method: list[str]
) -> None:
    run_dir = run("one", f"model.path={root / model}", *method)
    promotion = promote(run_dir)
    assert promotion.check is not None
    assert promotion.check.tokens == 32
    assert max(promotion.check.fold_difference, promotion.check.written_difference) <= 1e-4
    promoted, loading = AutoModelForSequenceClassification.from_pretrained(
        promotion.model, output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert promoted.config.architectures == [type(promoted).__name__]
    assert promoted.config.num_labels == 3
    assert promoted.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert promoted.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert promoted.config.problem_type == "single_label_classification"
    assert tensors(promotion.model) == {name for name, _ in promoted.named_parameters()}
    if (best(run_dir) / "config.json").is_file():
        expected: Any = AutoModelForSequenceClassification.from_pretrained(best(run_dir))
    else:
        base = AutoModelForSequenceClassification.from_pretrained(
            root / model, num_labels=3, pad_token_id=promoted.config.pad_token_id
        )
        expected = PeftModel.from_pretrained(base, best(run_dir))
    gap = logits(promoted, promotion.model) - logits(expected, promotion.model)
    assert gap.abs().max() <= 1e-4
    content = json.loads((run_dir / "promoted" / "evaluation.json").read_text())
    assert content["promoted"]["accuracy"] > content["base"]["accuracy"]
