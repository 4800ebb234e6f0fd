"""The labels of a base that is a classifier already are the data's by name, or it begins anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.schema import ModelConfig
from raytune_ft.merge.fold import fold
from raytune_ft.model.heads import Head
from raytune_ft.model.load import build_model, head_notes, load_base
from raytune_ft.model.meta import build
from tests.support.models import save_tiny_encoder, save_tiny_llama
from tests.support.runs import make_config, run

TOKENS = torch.tensor([[1, 40, 50, 60, 1]])
CLASSIFICATION = {
    "train.objective": "classification",
    "data.train.format": "classification",
    "train.max_examples": 21,
}


def classifier(folder: Path, family: str, labels: list[str]) -> Path:
    """A model with a head for these labels."""
    save = save_tiny_encoder if family == "bert" else save_tiny_llama
    base = save(folder)
    named = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(labels), pad_token_id=0, **named
    )
    for parameter in model.parameters():
        if len(labels) in parameter.shape:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(base)
    return base


def by_label(model: nn.Module) -> dict[str, float]:
    """The logit of each label."""
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=TOKENS).logits[0]
    names = model.config.id2label  # type: ignore[union-attr]
    return {names[i]: round(value, 4) for i, value in enumerate(logits.tolist())}  # type: ignore[operator, index]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_rows_of_the_head_are_those_of_the_data_by_name(tmp_path: Path, family: str) -> None:
    base = classifier(tmp_path / "base", family, ["c", "a", "b"])
    theirs = by_label(AutoModelForSequenceClassification.from_pretrained(base))
    model = ModelConfig(path=str(base))
    for labels in (("a", "b", "c"), ("c", "a", "b")):
        head = Head("single_label", labels)
        loaded = load_base(model, torch.float32, head)
        assert list(by_label(loaded)) == list(labels)
        assert by_label(loaded) == theirs
        parts = build(model, LoraMethod(rank=2), "float32", 0, in_parts=True, head=head)
        assert (parts.notes == ()) == (labels[0] == "a")
        whole = dict(build_model(model, LoraMethod(rank=2), "float32", 0, head).named_parameters())
        new = {name: p for name, p in parts.model.named_parameters() if not p.is_meta}
        assert any("original_module" in name for name in new)
        assert all(torch.equal(p, whole[name]) for name, p in new.items())
        notes = head_notes(model, head)
        assert bool(notes) == (labels[0] == "a")
        assert all("c, a, b; its rows are put in the order a, b, c" in note for note in notes)


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "d"), ("a", "b", "c", "d")])
def test_a_head_for_other_labels_is_drawn_anew(tmp_path: Path, labels: tuple[str, ...]) -> None:
    base = classifier(tmp_path / "base", "bert", ["c", "a", "b"])
    model, head = ModelConfig(path=str(base)), Head("single_label", labels)
    one, other = (by_label(load_base(model, torch.float32, head)) for _ in range(2))
    assert one == other
    assert list(one) == list(labels)
    assert max(map(abs, one.values())) < 1.0  # not the weights of the base
    assert f"for c, a, b; one for {', '.join(labels)} is drawn anew" in head_notes(model, head)[0]


@pytest.mark.parametrize("labels", [["b", "a"], ["x", "y", "z"]])
def test_a_run_and_its_fold(tmp_path: Path, labels: list[str]) -> None:
    """The base's own scores are those of its head, and the folded model has the data's labels."""
    base = classifier(tmp_path / "base", "bert", labels)
    theirs = AutoModelForSequenceClassification.from_pretrained(base)
    rows = [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(30)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(base, data, CLASSIFICATION)
    result = run(config, tmp_path / "run")
    assert result.status == "completed", result.error
    assert any("the base" in note for note in result.notes)
    last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    head = Head("single_label", ("a", "b"))
    fold(config.model, last, tmp_path / "out", [TOKENS[0]], head=head)
    made = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert made.config.id2label == {0: "a", 1: "b"}
    if labels == ["b", "a"]:  # three steps move a weight by hundredths
        moved = made.classifier.weight - theirs.classifier.weight.flip(0)
        assert 0 < moved.abs().max() < 0.05
