"""Log-probabilities of answers under a frozen reference: what they are, when they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import REFERENCE, PreparedData, open_prepared, sound_at
from raytune_ft.data.report import check_same
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import DataError, RunFailed
from raytune_ft.evaluate import precompute
from raytune_ft.evaluate.precompute import referenced
from raytune_ft.model.load import load_tokenizer
from raytune_ft.model.objectives import Objective
from raytune_ft.model.objectives.preference import Dpo
from raytune_ft.train.setup import evaluation_objective
from tests.support.objectives import config_of, save_inputs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return save_inputs(tmp_path)


def silent(line: str) -> None:
    """Nothing is said."""


def config(root: Path, objective: str = "dpo", **changes: Any) -> Config:
    return config_of(root, objective, {"train.precision": "float64", **changes})


def data_of(root: Path, settings: Config) -> PreparedData:
    return prepare_data(settings.data, load_tokenizer(settings.model), 0, root / "cache")


def by_transformers(root: Path, split: TokenizedSplit, model: str = "decoder") -> Iterator[float]:
    base = AutoModelForCausalLM.from_pretrained(root / model, dtype=torch.float64)
    for tokens, mask in map(split.sequence, range(len(split) * split.parts)):
        ids = torch.from_numpy(tokens.astype(np.int64))
        with torch.no_grad():
            logps_SV = base(ids[None]).logits[0].log_softmax(-1)
        for place in np.flatnonzero(mask):
            yield float(logps_SV[place - 1, ids[place]])


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_they_are_those_of_transformers(root: Path, objective: str) -> None:
    settings = config(root, objective)
    found = referenced(settings, data_of(root, settings), silent)
    for split in found.all_splits.values():
        ours = split.label_columns[REFERENCE]
        assert ours.dtype == np.float32
        theirs = np.array(list(by_transformers(root, split)))
        assert np.abs(ours - theirs).max() < 1e-5
    assert len(found.all_splits) == (4 if objective == "kto" else 2)


def test_another_model_may_be_the_reference(root: Path) -> None:
    settings = config(root, **{"train.dpo": {"reference": str(root / "teacher")}})
    found = referenced(settings, data_of(root, settings), silent)
    theirs = np.array(list(by_transformers(root, found.train, "teacher")))
    assert np.abs(found.train.label_columns[REFERENCE] - theirs).max() < 1e-5


def test_it_is_computed_once_for_all_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(root)
    first = referenced(settings, data_of(root, settings), silent)
    monkeypatch.setattr(precompute, "_reference_logps", None)
    other = config(root, **{"train.dpo": {"beta": 0.7, "loss_type": "hinge"}, "train.lr": 1.0})
    assert referenced(other, data_of(root, other), silent).path == first.path
    plain = config(root, "orpo")
    assert referenced(plain, data_of(root, plain), silent).train.label_columns == {}


def test_an_interrupted_pass_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute, "REFERENCE_BLOCK", 5)
    settings = config(root)
    data, written = data_of(root, settings), precompute.label_columns_of
    done: list[int] = []

    def counted(runner: Any, split: TokenizedSplit, examples: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(int(examples[0]))
        return written(runner, split, examples)

    monkeypatch.setattr(precompute, "label_columns_of", counted)
    with pytest.raises(KeyboardInterrupt):
        referenced(settings, data, silent)
    (blocks,) = (path for path in data.path.parent.glob(".reference-*") if path.is_dir())
    kept = sorted(path.name for path in blocks.iterdir())
    assert kept == [f"train-{start:012d}.npy" for start in (0, 5, 10)]
    done.clear()
    monkeypatch.setattr(
        precompute,
        "label_columns_of",
        lambda runner, split, examples: (done.append(0), written(runner, split, examples))[1],
    )
    found = referenced(settings, data, silent)
    assert len(done) == -(-len(data.train) // 5) - 3 + -(-len(data.validation) // 5)
    assert not blocks.exists()
    theirs = np.array(list(by_transformers(root, found.train)))
    assert np.abs(found.train.label_columns[REFERENCE] - theirs).max() < 1e-5


def test_damage_is_found_and_a_resume_keeps_its_reference(root: Path) -> None:
    settings = config(root)
    found = referenced(settings, data_of(root, settings), silent)
    saved = root / "data.json"
    saved.write_text(found.report.to_json())
    other = config(root, **{"train.dpo": {"reference": str(root / "teacher")}})
    with pytest.raises(DataError, match="a reference with files of sha256"):
        referenced(other, data_of(root, other), silent, lambda report: check_same(saved, report))
    file = found.path / "reference_train.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert sound_at(found.path) is None
    again = referenced(settings, data_of(root, settings), silent)
    assert sound_at(again.path) is not None


def test_without_it_nothing_is_computed(root: Path) -> None:
    settings = config(root)
    data = open_prepared(data_of(root, settings).path)
    objective: Objective = evaluation_objective(settings.train, data)
    assert isinstance(objective, Dpo)
    runner = precompute.runner_of(settings.model, load_tokenizer(settings.model))
    with pytest.raises(RunFailed, match="no log-probabilities of the reference"):
        precompute.columns_of(runner, objective, data.validation)
