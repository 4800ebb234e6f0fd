"""Classifiers become plain model directories, and are held against a constant answer."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.stats import pearsonr
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import f1_score, log_loss, mean_squared_error, r2_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raytune_ft.config.load import load_config, validated
from raytune_ft.config.metrics import METRICS, RETENTION, deciding, direction, label
from raytune_ft.config.objectives import OBJECTIVES, SEARCHABLE, Figure, figures
from raytune_ft.config.rules import check
from raytune_ft.config.schema import PromoteConfig
from raytune_ft.config.search import SearchConfig
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError, ModelError
from raytune_ft.evaluate.classifier import constant_scores, scores_of
from raytune_ft.evaluate.evaluate import evaluate_directory
from raytune_ft.evaluate.scores import Scores
from raytune_ft.merge.export import export
from raytune_ft.merge.fold import fold
from raytune_ft.merge.merge import merge
from raytune_ft.model.heads import Head
from raytune_ft.model.objectives.classification import Classification
from raytune_ft.promote.promote import Promotion, promote
from raytune_ft.report.write import write_report
from tests.support.models import save_tiny_encoder, save_tiny_llama
from tests.support.trained import Train, train_as

TEXTS = ["a bad cad", "dad", "fed a bee, he did", "gag"]


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


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train a classifier with overrides; its directory."""
    storage = tmp_path_factory.mktemp("runs")
    file = storage / "config.yaml"
    file.write_text(
        f"""
        name: some
        storage: {storage}
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

    return partial(train_as, file)


def best(run_dir: Path) -> Path:
    return run_dir / str(json.loads((run_dir / "result.json").read_text())["best"]["checkpoint"])


@pytest.fixture(scope="module")
def trained(run: Train) -> Path:
    """An encoder that has learned something by LoRA."""
    return run("trained")


@pytest.fixture(scope="module")
def promoted(trained: Path) -> Promotion:
    """What came of it."""
    return promote(trained)


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
        ("decoder", ["method.name=vera"]),
        ("encoder", ["method.name=full", "train.lr=3e-3", "train.class_weights=balanced"]),
        ("decoder", ["method.name=freeze", "method.last=1", "train.lr=3e-3"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].partition("=")[2],
)
def test_a_promoted_classifier_is_base_and_adapter(
    run: Train, root: Path, model: str, method: list[str]
) -> None:
    run_dir = run(f"{model}-{method[0][12:]}", f"model.path={root / model}", *method)
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
    # It scores what training said of it, by the same weights of classes.
    said = json.loads((run_dir / "result.json").read_text())["best"]
    figures = content["candidates"][1]["figures"]
    for name in ("eval_loss", "eval_accuracy", "eval_macro_f1", "eval_calibration_error"):
        own = name if name == "eval_loss" else name[5:]
        assert figures[own] == pytest.approx(said[name], abs=1e-5)


def test_what_was_measured_is_written_and_shown(
    trained: Path, promoted: Promotion, tmp_path: Path
) -> None:
    folder = trained / "promoted"
    content = json.loads((folder / "evaluation.json").read_text())
    figures = {"eval_loss", "accuracy", "macro_f1", "calibration_error"}
    assert content["base"].keys() == content["promoted"].keys() == figures
    assert content["differences"].keys() == figures
    assert (content["split"], content["examples"], content["looks"]) == ("test", 40, 1)
    assert (content["reference"], content["samples"]) == ("constant", [])
    assert [one["name"] for one in content["candidates"]] == ["constant", "trained"]
    assert content["winner"] == "trained"
    assert promoted.better
    assert content["verdict"].startswith("promoted is better than constant (eval_loss ")
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    own = [row for row in rows if (row["split"], row["candidate"]) == ("test", "trained")]
    assert len(own) == 40
    assert np.mean([row["accuracy"] for row in own]) == content["promoted"]["accuracy"]
    assert np.mean([row["eval_loss"] for row in own]) == pytest.approx(
        content["promoted"]["eval_loss"], abs=1e-5
    )
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == content["promoted"]
    for fact in (
        "| on test (40 examples) | constant | promoted |",
        "In their order: a, b, c.",
        "32 held-out ex",
    ):
        assert fact in card.text
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text
    page = write_report(trained).parent / "report.html"
    for fact in (
        "macro_f1",
        "calibration_error",
        '<th class="number">constant</th>',
        "suits the training set",
    ):
        assert fact in page.read_text()
    # The written model, read as transformers reads it, says what was measured.
    model = AutoModelForSequenceClassification.from_pretrained(promoted.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(promoted.model)
    lines = (load_config(trained / "config.yaml").data.test.path,)  # type: ignore[union-attr]
    tested = [json.loads(line) for line in Path(lines[0]).read_text().splitlines()]
    with torch.no_grad():
        given = tokenizer([row["text"] for row in tested], padding=True, return_tensors="pt")
        shares = model(**given).logits.softmax(1).numpy()
    wanted = ["abc".index(row["label"]) for row in tested]
    assert content["promoted"]["eval_loss"] == pytest.approx(log_loss(wanted, shares), abs=1e-5)
    assert content["promoted"]["macro_f1"] == pytest.approx(
        f1_score(wanted, shares.argmax(1), average="macro"), abs=1e-6
    )
    config = load_config(trained / "config.yaml")
    _, examples, again = evaluate_directory(promoted.model, config, tmp_path / "cache")
    assert examples == 40
    assert again == pytest.approx(content["promoted"], abs=1e-6)


def test_a_classifier_is_exported_as_one(
    trained: Path, promoted: Promotion, tmp_path: Path
) -> None:
    export(promoted.model, tmp_path / "out", dtype="bfloat16")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").dtype == (
        torch.bfloat16
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    assert (model.config.id2label, model.config.num_labels) == ({0: "a", 1: "b", 2: "c"}, 3)
    exact = AutoModelForSequenceClassification.from_pretrained(promoted.model)
    gap = logits(model, promoted.model) - logits(exact, promoted.model)
    assert 0 < gap.abs().max() < 0.1
    with pytest.raises(ModelError, match="adapter of a classifier, and does not hold its labels"):
        export(best(trained), tmp_path / "adapter")


def test_what_has_learned_nothing_is_not_called_better(run: Train) -> None:
    promotion = promote(run("idle", "train.lr=1e-9", "train.epochs=1"))
    assert not promotion.better
    assert promotion.evaluation.winner == "idle"
    assert "promoted is better" not in promotion.evaluation.verdict
    assert (promotion.model / "config.json").is_file()


def split_of(target: Any, weight: Any = None) -> TokenizedSplit:
    ids = [(np.arange(3, dtype=np.int32), np.zeros(3, bool)) for _ in target]
    columns = {"target": np.asarray(target, np.float32)}
    if weight is not None:
        columns["weight"] = np.asarray(weight, np.float32)[:, None]
    return TokenizedSplit.from_examples(ids, columns)


def own_figures(head: Classification) -> tuple[Figure, ...]:
    return figures("classification", head.problem)


def values_of(scores: dict[str, Scores]) -> dict[str, float]:
    return {name: score.value for name, score in scores.items()}


def test_figures_of_one_label() -> None:
    rng = np.random.default_rng(0)
    wanted, outputs = rng.integers(0, 4, 50), rng.normal(size=(50, 4))
    weight = rng.uniform(0, 2, 50).astype(np.float32)
    head = Classification("single_label", (1.0,) * 4)
    train, split = split_of(np.eye(4)[rng.integers(0, 4, 90)]), split_of(np.eye(4)[wanted], weight)
    found = values_of(scores_of(torch.from_numpy(outputs), split, head, own_figures(head)))
    shares = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    assert found["eval_loss"] == pytest.approx(log_loss(wanted, shares, sample_weight=weight))
    assert found["accuracy"] == (outputs.argmax(1) == wanted).mean()
    expected = f1_score(wanted, outputs.argmax(1), average="macro")
    assert found["macro_f1"] == pytest.approx(expected)
    # The constant is scikit-learn's.
    dummy = DummyClassifier(strategy="prior").fit(np.zeros(90), train.columns["target"].argmax(1))
    constant = constant_scores(train, split, head, own_figures(head))
    expected = log_loss(wanted, dummy.predict_proba(np.zeros(50)), sample_weight=weight)
    assert constant["eval_loss"].value == pytest.approx(expected)
    assert constant["accuracy"].value == (dummy.predict(np.zeros(50)) == wanted).mean()
    # Where labels count alike it is sure of none, and says the most frequent.
    counts = train.columns["target"].sum(0).astype(np.float64)
    balanced = Classification("single_label", tuple((90 / (4 * counts)).tolist()))
    constant = constant_scores(train, split, balanced, own_figures(balanced))
    assert constant["eval_loss"].value == pytest.approx(np.log(4))
    assert constant["accuracy"].value == (counts.argmax() == wanted).mean()


def test_figures_of_several_labels() -> None:
    rng = np.random.default_rng(0)
    wanted, outputs = rng.random((50, 3)) < 0.3, rng.normal(size=(50, 3))
    head, split = Classification("multi_label", (1.0,) * 3), split_of(wanted)
    found = values_of(scores_of(torch.from_numpy(outputs), split, head, own_figures(head)))
    shares = 1 / (1 + np.exp(-outputs))
    losses = [log_loss(wanted[:, i], shares[:, i]) for i in range(3)]
    assert found["eval_loss"] == pytest.approx(np.mean(losses))
    assert found["accuracy"] == ((outputs > 0) == wanted).all(1).mean()
    assert found["macro_f1"] == pytest.approx(f1_score(wanted, outputs > 0, average="macro"))
    constant = constant_scores(split_of(np.ones((20, 3))), split, head, own_figures(head))[
        "eval_loss"
    ].value
    assert constant == pytest.approx(-np.where(wanted, np.log(21 / 22), np.log(1 / 22)).mean())


def test_figures_of_numbers() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(50, 2)).astype(np.float32)
    outputs = wanted + rng.normal(size=(50, 2))
    head, split = Classification("regression", (1.0,) * 2), split_of(wanted)
    found = values_of(scores_of(torch.from_numpy(outputs), split, head, own_figures(head)))
    mse = mean_squared_error(wanted, outputs)
    assert (found["eval_loss"], found["mse"]) == pytest.approx((mse, mse))
    assert found["r2"] == pytest.approx(r2_score(wanted, outputs))
    each = [pearsonr(wanted[:, i], outputs[:, i]).statistic for i in range(2)]
    assert found["pearson"] == pytest.approx(np.mean(each))
    train = split_of(rng.normal(size=(90, 2)))
    dummy = DummyRegressor().fit(np.zeros(90), train.columns["target"])
    constant = values_of(constant_scores(train, split, head, own_figures(head)))
    guessed = dummy.predict(np.zeros(50))
    assert constant["mse"] == pytest.approx(mean_squared_error(wanted, guessed), rel=1e-5)
    assert constant["r2"] == pytest.approx(r2_score(wanted, guessed), rel=1e-5)
    assert constant["pearson"] == pytest.approx(0, abs=1e-9)


def test_a_soup_is_the_mean_of_what_was_folded(run: Train, trained: Path, tmp_path: Path) -> None:
    """Whatever the methods; the heads as well."""
    second = run("second", "method.name=full", "train.lr=3e-3", "train.epochs=1")
    sweep = tmp_path / "sweep"
    rows = []
    for name, one in (("t0", trained), ("t1", second)):
        shutil.copytree(one, sweep / "trials" / name, ignore=shutil.ignore_patterns("promoted"))
        value = json.loads((one / "result.json").read_text())["best"]["eval_accuracy"]
        rows.append({"id": name, "params": {}, "status": "completed", "value": value})
    config = (trained / "config.yaml").read_text()
    searched = "search: {metric: eval_accuracy, space: {train.lr: {uniform: [0.1, 0.2]}}}\n"
    config = config.replace("merge: best", "merge: auto").replace("search:\n", searched)
    (sweep / "config.yaml").write_text(config)
    (sweep / "result.json").write_text(json.dumps({"status": "completed", "trials": rows}))
    promotion = promote(sweep)
    assert promotion.evaluation.metric == "accuracy"
    names = [one.name for one in promotion.evaluation.candidates]
    assert names[0] == "constant"
    assert names[2:] == ["uniform_soup", "greedy_soup"]

    head = Head("single_label", ("a", "b", "c"))
    model = load_config(trained / "config.yaml").model
    examples = [torch.arange(2, 9), torch.arange(3, 30)]
    members = [best(trained), best(second)]
    merge(model, members, tmp_path / "soup", "uniform_soup", examples, head=head)
    for place, checkpoint in enumerate(members):
        fold(model, checkpoint, tmp_path / str(place), examples, head=head)
    soup, one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("soup", "0", "1"))
    assert soup.keys() == one.keys() == two.keys()
    assert (one["classifier.weight"] - two["classifier.weight"]).abs().max() > 1e-3
    for name, tensor in soup.items():
        assert (tensor - (one[name] + two[name]) / 2).abs().max() <= 1e-6, name


SPACE = {"space": {"method.name": {"choice": ["lora", "loreft"]}}}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"metrics": ["loss", "answer"]}, "=answer scores continuations, and train.objective=cl"),
        (
            {"retention": {"path": "x.jsonl", "format": "text"}},
            "measures token predictions, and .* makes none; leave it out",
        ),
        ({"merge": "ties"}, "starts from the base, which has no head .*; write best, uniform_soup"),
        ({"merging": {"adapter_rank": 2}}, "trains a whole head beside them; leave it out"),
        (
            {"metric": "exact_match"},
            "is not a figure of data.problem=single_label; write one of eval",
        ),
        ({"search": SPACE}, "=loreft cannot train the head.*; write lora, freeze or full"),
        ({"metric": "macro_f1"}, None),
        ({"metrics": ["loss", "classification"], "metric": "accuracy", "merge": "auto"}, None),
    ],
)
def test_what_a_head_does_not_have_is_refused(written: Any, message: str | None) -> None:
    search = {"search": written["search"]} if "search" in written else {}
    plain = {
        "name": "x",
        "data": {"train": {"path": "a.jsonl", "format": "classification"}},
        "train": {"objective": "classification"},
        "promote": {key: value for key, value in written.items() if key != "search"},
        **search,
    }
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        check(validated(plain))


@pytest.mark.parametrize("metric", SEARCHABLE)
def test_every_metric_of_a_search_decides_a_promotion(metric: str) -> None:
    search = SearchConfig(metric=metric, space={"seed": {"choice": [1]}})
    figure = deciding(PromoteConfig(), search)
    measured = [each for entry in OBJECTIVES.values() for each in entry.figures]
    assert figure in [each.promoted for each in measured]
    assert direction(figure) == direction(metric) == search.modes[0]


def test_figures_are_known_by_both_names() -> None:
    assert (label("eval_macro_f1"), label("macro_f1")) == ("macro F1", "macro F1")
    assert (label("token_accuracy"), direction("token_accuracy")) == ("token accuracy", "max")
    assert (label("retention_kl"), direction("retention_kl")) == (
        RETENTION["retention_kl"].label,
        "min",
    )
    assert {direction(each.name) for each in METRICS["rouge"].figures} == {"max"}
    assert (label("arc_easy/acc"), direction("arc_easy/acc")) == ("arc_easy/acc", None)


def test_numbers_that_do_not_vary_have_no_r2() -> None:
    """Whatever rounding leaves of their variance."""
    head, split = Classification("regression", (1.0, 1.0)), split_of(np.full((30, 2), 0.1))
    outputs = np.random.default_rng(0).normal(size=(30, 2))
    found = values_of(scores_of(torch.from_numpy(outputs), split, head, own_figures(head)))
    assert (found["r2"], found["pearson"]) == (0.0, 0.0)
    assert found["mse"] == pytest.approx(((outputs - 0.1) ** 2).mean(), rel=1e-6)
