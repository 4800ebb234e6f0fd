"""Losses and figures against Hugging Face's own, and against plain float64 arithmetic."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, mean_squared_error, r2_score
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import PreparedData
from raytune_ft.errors import DataError
from raytune_ft.evaluate.evaluate import evaluate_directory
from raytune_ft.model.load import load_tokenizer
from raytune_ft.model.meta import build
from raytune_ft.strategy.single import Single
from raytune_ft.train.evaluation import evaluate
from raytune_ft.train.loop import accumulate_gradients
from raytune_ft.train.material import Work
from raytune_ft.train.model_runner import ModelRunner
from raytune_ft.train.optim import build_optimizer
from raytune_ft.train.setup import build_objective, build_runner, head_of
from tests.support.objectives import config_of, save_inputs
from tests.support.runs import run

SOME = np.arange(12)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def _built(root: Path, config: Config) -> tuple[ModelRunner, PreparedData]:
    data = prepare_data(config.data, load_tokenizer(config.model), 0, root / "cache")
    strategy = Single(config.parallel, config.train.precision)
    built = build(config.model, config.method, "float32", 0, False, head_of(config, data.report))
    objective = build_objective(config, data, strategy)
    optimizer_of = partial(build_optimizer, train=config.train)
    return build_runner(built, config, strategy, optimizer_of, objective), data


def _losses(root: Path, objective: str, changes: dict[str, Any], model: str = "decoder") -> Any:
    """Our loss of some examples, the engine and the data."""
    full = {"method": {"name": "full"}, "data.packing": "auto"}
    engine, data = _built(root, config_of(root, objective, {**full, **changes}, model))
    loss_sum, count = _accumulate(engine, data.train, SOME)
    loss = loss_sum / count
    return loss, engine, data


def _accumulate(engine: Any, split: Any, indices: Any) -> tuple[float, float]:
    batches = engine.micro_batches(split, indices)
    loss_sum, count = accumulate_gradients(engine, Work.of(split, indices, batches))
    return loss_sum.item(), count


CLASSES: dict[str, dict[str, Any]] = {
    "single_label": {},
    "multi_label": {"data.train.label": "labels", "train.class_weights": "none"},
    "regression": {"data.train.label": "numbers", "train.class_weights": "none"},
}


@pytest.mark.parametrize("model", ["encoder", "decoder"])
@pytest.mark.parametrize("problem", CLASSES)
def test_a_head_has_the_loss_that_transformers_computes(
    tmp_path: Path, root: Path, problem: str, model: str
) -> None:
    none = {"train.class_weights": "none", "data.problem": problem, **CLASSES[problem]}
    loss, engine, data = _losses(root, "classification", none, model)
    engine.model.save_pretrained(tmp_path)  # type: ignore[operator]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == dict(enumerate(data.report.labels))
    expected = []
    for i in SOME:
        ids, target = data.train.example(i)[0], data.train.columns["target"][i]
        labels = torch.tensor(target[None])
        labels = labels.argmax(1) if problem == "single_label" else labels
        given = torch.tensor(ids[None].astype(np.int64))
        with torch.no_grad():
            expected.append(theirs(input_ids=given, labels=labels).loss.item())
    assert loss == pytest.approx(np.mean(expected), abs=1e-6)
    assert engine.packing
    assert engine.reading is not None
    assert engine.reading.place == ("first" if model == "encoder" else "last")


def test_a_second_text_is_told_apart_as_transformers_does(tmp_path: Path, root: Path) -> None:
    changes = {"data.train.text_pair": "other", "train.class_weights": "none"}
    loss, engine, data = _losses(root, "classification", changes, "encoder")
    engine.model.save_pretrained(tmp_path)  # type: ignore[operator]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = load_tokenizer(config_of(root, "classification", {}, "encoder").model)
    rows = {
        tuple(tokenizer(row["text"], row["other"])["input_ids"]): row
        for row in map(json.loads, (root / "rows.jsonl").read_text().splitlines())
    }
    expected = []
    for i in SOME:
        row = rows[tuple(data.train.example(i)[0].tolist())]
        given = tokenizer(row["text"], row["other"], return_tensors="pt")
        assert given["token_type_ids"].any()
        label = torch.tensor(["abc".index(row["label"])])
        with torch.no_grad():
            expected.append(theirs(**given, labels=label).loss.item())
    assert loss == pytest.approx(np.mean(expected), abs=1e-6)


def test_clm_has_the_loss_that_transformers_computes(root: Path) -> None:
    loss, engine, data = _losses(root, "clm", {"data.chunk": {"overlap": 0}})
    theirs = AutoModelForCausalLM.from_pretrained(root / "decoder").eval()
    total = count = 0.0
    for i in SOME:
        ids = torch.tensor(data.train.example(i)[0][None].astype(np.int64))
        with torch.no_grad():
            total += theirs(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert loss == pytest.approx(total / count, abs=1e-6)
    figures = evaluate(engine, data.validation).figures
    assert figures["eval_perplexity"] == pytest.approx(np.exp(figures["eval_loss"]))


def test_every_token_of_a_document_is_learnt_once(root: Path) -> None:
    """All but its first, whatever the overlap."""
    counts = {}
    for overlap in (1, 4):
        changes = {"data.chunk": {"overlap": overlap}, "data.validation": 0.01}
        config = config_of(root, "clm", changes)
        data = prepare_data(config.data, load_tokenizer(config.model), 0, root / "cache")
        assert data.train.lengths.max() == 12
        splits = [data.train, data.validation]
        counts[overlap] = sum(int(split.label_counts.sum()) for split in splits)
    rows = map(json.loads, (root / "rows.jsonl").read_text().splitlines())
    assert set(counts.values()) == {sum(len(row["text"]) for row in rows)}  # and an end, less one


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_kd_is_the_divergence_of_two_softmaxes(root: Path, divergence: str) -> None:
    settings = {"divergence": divergence, "temperature": 2.0, "weight": 0.7}
    changes = {"train.kd": {**settings, "teacher": str(root / "teacher")}}
    loss, _, data = _losses(root, "kd", changes)
    models = [
        AutoModelForCausalLM.from_pretrained(root / name).double().eval()
        for name in ("decoder", "teacher")
    ]
    total = count = 0.0
    for i in SOME:
        ids, mask = data.train.example(i)
        given = torch.tensor(ids[None].astype(np.int64))
        keep = torch.tensor(mask[1:])
        with torch.no_grad():
            student, teacher = (model(input_ids=given).logits[0, :-1][keep] for model in models)
        hard = -student.log_softmax(-1).gather(1, given[0, 1:][keep][:, None]).sum()
        p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
        p, q = (p, q) if divergence == "forward" else (q, p)
        total += 0.3 * hard.item() + 0.7 * 4 * (p * (p.log() - q.log())).sum().item()
        count += int(keep.sum())
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_weights_are_those_of_the_rows(root: Path) -> None:
    loss, engine, data = _losses(root, "sft", {"train.label_smoothing": 0.0})
    theirs = AutoModelForCausalLM.from_pretrained(root / "decoder").eval()
    total = count = 0.0
    for i in SOME:
        ids, mask = data.train.example(i)
        given, keep = torch.tensor(ids[None].astype(np.int64)), torch.tensor(mask[1:])
        with torch.no_grad():
            logits = theirs(input_ids=given).logits[0, :-1][keep]
        weight = float(data.train.columns["weight"][i, 0])
        total += weight * F.cross_entropy(logits, given[0, 1:][keep], reduction="sum").item()
        count += weight * int(keep.sum())
    assert loss == pytest.approx(total / count, abs=1e-6)
    nothing = np.flatnonzero(data.train.columns["weight"][:, 0] == 0)
    assert _accumulate(engine, data.train, nothing)[0] == 0


def test_rationales_weigh_as_published(root: Path) -> None:
    """(L_label + 0.3 L_rationale) / 1.3, each the mean over its own tokens, of the whole split."""
    _, engine, data = _losses(root, "rationale", {})
    loss_sum, count = _accumulate(engine, data.train, np.arange(len(data.train)))
    loss = loss_sum / count
    theirs = AutoModelForCausalLM.from_pretrained(root / "decoder").eval()
    sums, counts = np.zeros(2), np.zeros(2)
    for i in range(len(data.train)):
        ids, mask = data.train.example(i)
        given, keep = torch.tensor(ids[None].astype(np.int64)), torch.tensor(mask[1:])
        with torch.no_grad():
            logits = theirs(input_ids=given).logits[0, :-1][keep]
        task = int(data.train.columns["rationale"][i, 0])
        sums[task] += F.cross_entropy(logits, given[0, 1:][keep], reduction="sum").item()
        counts[task] += int(keep.sum())
    answers, reasons = sums / counts
    assert loss == pytest.approx((answers + 0.3 * reasons) / 1.3, abs=1e-5)
    assert not data.validation.columns["rationale"].any()  # measured by answers


def test_figures_are_those_of_scikit_learn(root: Path) -> None:
    for problem in ("single_label", "regression"):
        changes = {"data.problem": problem, **CLASSES[problem], "data.validation": 0.4}
        _, engine, data = _losses(root, "classification", changes)
        figures = evaluate(engine, data.validation).figures
        split = data.validation
        with torch.no_grad():
            found = torch.cat(
                [
                    engine.example_logits(engine.collate(split, np.array([i]), ((0,),)))
                    for i in range(len(split))
                ]
            ).numpy()
        wanted = split.columns["target"]
        if problem == "regression":
            assert figures["eval_mse"] == pytest.approx(mean_squared_error(wanted, found), rel=1e-5)
            assert figures["eval_r2"] == pytest.approx(r2_score(wanted, found), rel=1e-5)
            pearson = [np.corrcoef(wanted[:, k], found[:, k])[0, 1] for k in (0, 1)]
            assert figures["eval_pearson"] == pytest.approx(np.mean(pearson), rel=1e-5)
        else:
            guess, real = found.argmax(1), wanted.argmax(1)
            assert figures["eval_accuracy"] == pytest.approx((guess == real).mean())
            f1 = f1_score(real, guess, average="macro", zero_division=0.0)
            assert figures["eval_macro_f1"] == pytest.approx(f1)


def test_neftune_is_noise_of_its_size_and_not_in_evaluations(root: Path) -> None:
    plain, *_ = _losses(root, "sft", {})
    noisy, engine, data = _losses(root, "sft", {"train.neftune_alpha": 5.0})
    assert abs(noisy - plain) > 1e-4
    assert evaluate(engine, data.validation) == evaluate(engine, data.validation)


def test_a_full_checkpoint_is_a_classifier_by_itself(tmp_path: Path, root: Path) -> None:
    config = config_of(root, "classification", {"method": {"name": "full"}}, "encoder")
    result = run(config, tmp_path / "run")
    assert result.best is not None
    folder = tmp_path / "run" / str(result.best.checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.problem_type == "single_label_classification"
    _, examples, figures = evaluate_directory(folder, config, tmp_path / "cache")
    assert examples == 8
    assert figures["accuracy"] == result.best.figures["eval_accuracy"]
    other = config_of(root, "classification", {"data.labels": ["c", "b", "a"]}, "encoder")
    again = evaluate_directory(folder, other, tmp_path / "cache")[2]
    assert again["accuracy"] == figures["accuracy"]


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ("classification", {"data.labels": ["a", "b"]}, "has the label 'c'"),
        ("classification", {"data.labels": ["a", "b", "c", "d"]}, "has the label 'd', which no"),
        ("classification", {"data.problem": "regression"}, "bad_label"),
        ("sft", {"data.train.example_weight": "prompt"}, "bad_weight"),
    ],
)
def test_wrong_rows_are_one_clear_line(
    root: Path, objective: str, changes: dict[str, Any], message: str
) -> None:
    config = config_of(root, objective, changes)
    with pytest.raises(DataError, match=message):
        prepare_data(config.data, load_tokenizer(config.model), 0, root / "cache")
