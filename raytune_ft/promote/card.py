"""The model card: what was made, from what, by what, how good it is, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, RepoCard

import raytune_ft
from raytune_ft.config.data import source_configs
from raytune_ft.config.methods import METHODS
from raytune_ft.config.metrics import RETENTION
from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.data.report import DataReport
from raytune_ft.merge.fold import FoldCheck
from raytune_ft.promote.decide import Evaluation, Sample

PACKAGES = ("torch", "transformers", "peft", "ray")


@dataclass(frozen=True)
class Lineage:
    """Where a promoted model comes from. Paths are left out: hashes say more, and travel."""

    name: str
    config: Config
    config_sha256: str
    base_files: dict[str, str]
    data: DataReport
    trial: str | None
    params: Mapping[str, Any]
    step: int | None
    examples: int | None
    versions: dict[str, str]


def base_name(model: ModelConfig) -> str:
    """The hub id or `builtin:` name; of a local directory its last part alone."""
    return Path(model.path).name if Path(model.path).is_absolute() else model.path


def known_license(directory: Path) -> str | None:
    """What the model card or dataset card in a directory says; None where it says nothing."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    try:
        found = RepoCard.load(card).data.to_dict().get("license")
    except (OSError, ValueError):  # some other README
        return None
    return str(found) if found else None


def licenses(config: Config) -> dict[str, str]:
    """ "base", "data.train" and so on -> licence, as far as cards beside them say it."""
    places = {"base": config.model.path} | {
        f"data.{name}": str(Path(source.path).parent)
        for name, source in source_configs(config.data).items()
    }
    found = {name: known_license(Path(place)) for name, place in places.items()}
    return {name: text for name, text in found.items() if text is not None}


def package_versions() -> dict[str, str]:
    """What the fold and the evaluation ran with."""
    return {"raytune_ft": raytune_ft.__version__} | {name: version(name) for name in PACKAGES}


MAX_LABELS = 50
"""That are listed; `config.json` has them all."""
_METRIC_NAMES = {
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "answer_exact_match": "exact match of the answer",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "calibration_error": "expected calibration error",
    "mse": "mean squared error",
    "r2": "R2",
    "pearson": "Pearson's r",
    "retention_loss": "loss on the general set",
    "retention_kl": "KL from the base on the general set",
}


def model_card(
    lineage: Lineage,
    evaluation: Evaluation,
    check: FoldCheck | None,
    samples: Sequence[Sample],
    unfolded: str | None = None,
) -> ModelCard:
    """The card as `huggingface_hub` reads it: YAML metadata, then Markdown. `unfolded`: the kind of
    adapter that was promoted as it is.
    """
    config = lineage.config
    known = licenses(config)
    classifies = lineage.data.problem is not None
    task = "text-classification" if classifies else "text-generation"
    is_hub_id = base_name(config.model) == config.model.path and ":" not in config.model.path
    data = ModelCardData(
        model_name=lineage.name,
        license=known.get("base"),
        base_model=config.model.path if is_hub_id else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["raytune_ft", config.method.name],
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type="custom",
                dataset_name=_measured_source(lineage.data, evaluation.split),
                dataset_split=evaluation.split,
                metric_type=name,
                metric_name=_metric_name(name, evaluation),
                metric_value=value,
            )
            for name, value in evaluation.promoted.items()
            if name not in RETENTION and "/" not in name  # which are of other data
        ],
    )
    body = "\n\n".join(
        [
            f"# {lineage.name}",
            f"{base_name(config.model)}, fine-tuned with raytune_ft (method {config.method.name}).",
            f"**Verdict: {evaluation.verdict}.**",
            _evaluation_section(evaluation),
            _candidates_section(evaluation),
            _labels_section(lineage.data) if classifies else _samples_section(samples),
            _loading_section(classifies)
            if unfolded is None
            else _adapter_section(unfolded, config.model),
            _lineage_section(lineage, known),
            "" if check is None else _fold_section(check, lineage),
        ]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _evaluation_section(evaluation: Evaluation) -> str:
    rows = []
    for name, value in evaluation.promoted.items():
        new = evaluation.differences.get(name)
        shown = "" if new is None else _figure(new["difference"])
        interval = "" if new is None else _interval(new["interval"])
        base = evaluation.base.get(name)
        known = "" if base is None else _figure(base)
        rows.append((_metric_name(name, evaluation), known, _figure(value), shown, interval))
    looks = f"measured {evaluation.looks} time{'s' if evaluation.looks > 1 else ''} so far"
    caution = (
        ""
        if evaluation.split == "test"
        else " There was no test data: these examples also chose the model, so the figures flatter."
    )
    sure = f"{evaluation.confidence:.0%} interval"
    head = ("metric", evaluation.reference, "promoted", "difference", sure)
    about = (
        ""
        if evaluation.reference == "base"
        else " `constant` gives every example the one answer that suits the training set best: "
        "the base has no head to be compared with."
    )
    return (
        f"## Evaluation\n\nOn {evaluation.examples:,} examples of the {evaluation.split} split, "
        f"{looks}.{caution} Intervals are of a paired bootstrap over examples.{about}\n\n"
        f"{_table(head, rows)}"
    )


def _candidates_section(evaluation: Evaluation) -> str:
    """Who else might have been promoted."""
    figure = evaluation.metric
    rows = []
    for one in evaluation.candidates:
        gap = "" if one.difference is None else _figure(one.difference)
        interval = "" if one.difference is None else _interval(one.interval)
        mark = f"**{one.name}**" if one.name == evaluation.winner else one.name
        rows.append((mark, _figure(one.figures[figure]), gap, interval))
    head = ("candidate", _metric_name(figure, evaluation), "difference to the best", "interval")
    return (
        f"## Candidates\n\nCompared on {evaluation.validation_examples:,} examples of the "
        f"validation split alone. Of those that the data do not tell from the best one, the "
        f"simplest is promoted.\n\n{_table(head, rows)}"
    )


def _samples_section(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    shown = []
    for sample in samples:
        parts = {
            "prompt": sample.prompt,
            "reference": sample.reference,
            "base": sample.base,
            "promoted": sample.promoted,
        }
        shown.append("\n".join(f"{name}: {' '.join(text.split())}" for name, text in parts.items()))
    fence = "~~~~~~~~"
    return f"## Samples\n\nGreedy decoding.\n\n{fence}text\n" + "\n\n".join(shown) + f"\n{fence}"


def _labels_section(data: DataReport) -> str:
    """What the head's outputs stand for."""
    what = {
        "single_label": "One label each: the largest output, and its softmax is the confidence",
        "multi_label": "Any number of labels: those whose output is above 0",
    }.get(data.problem or "", "Numbers, as they are in the data")
    names = [label.replace("\n", " ") for label in data.labels]
    rest = f" and {len(names) - MAX_LABELS} more" * (len(names) > MAX_LABELS)
    return f"## Labels\n\n{what}. In their order: {', '.join(names[:MAX_LABELS])}{rest}."


def _loading_section(classifies: bool) -> str:
    kind = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
    return (
        "## Use\n\nThe directory `model` beside this file is a plain Hugging Face model:\n\n"
        f"```python\nfrom transformers import {kind}, AutoTokenizer\n\n"
        f'model = {kind}.from_pretrained("promoted/model")\n'
        'tokenizer = AutoTokenizer.from_pretrained("promoted/model")\n```'
    )


def _adapter_section(kind: str, base: ModelConfig) -> str:
    """How to load what is no model by itself."""
    path = base_name(base)
    if kind.isupper():  # PEFT's own
        return (
            "## Use\n\nThe directory `adapter` beside this file is a PEFT adapter, which works on "
            "activations and is not folded into weights:\n\n"
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, "
            "AutoTokenizer\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{path}")\n'
            'model = PeftModel.from_pretrained(base, "promoted/adapter")\n'
            'tokenizer = AutoTokenizer.from_pretrained("promoted/adapter")\n```'
        )
    return (
        f"## Use\n\nThe directory `adapter` beside this file holds the method `{kind}` in "
        "safetensors and JSON. It works on activations and is not folded into weights. "
        f"`docs/interventions.md` of raytune_ft has the few lines that put it into {path} with "
        "transformers alone."
    )


def _lineage_section(lineage: Lineage, known: Mapping[str, str]) -> str:
    facts = [
        ("base model", base_name(lineage.config.model)),
        ("config sha256", lineage.config_sha256),
        ("seed", str(lineage.config.seed)),
    ]
    if lineage.examples is not None:
        steps = f"{lineage.examples:,} examples, {lineage.step:,} steps"
        facts.append(("trained for", steps))
    if lineage.config.model.revision:
        facts.insert(1, ("revision", lineage.config.model.revision))
    if lineage.trial is not None:
        facts.append(("trial", lineage.trial))
    facts += [(key, str(value)) for key, value in lineage.params.items()]
    trained = [f"data.{name}" for name in source_configs(lineage.config.data) if _is_of(name)]
    facts += [(f"licence of {name}", known.get(name, "not known")) for name in ["base", *trained]]
    facts += [(f"version of {name}", found) for name, found in lineage.versions.items()]
    files = [(f"base: {name}", digest) for name, digest in lineage.base_files.items()]
    files += [
        (f"data.{split}: {source.name}", source.sha256)
        for split, source in lineage.data.sources.items()
    ]
    duplicates, overlaps = (
        ", ".join(f"{pair} {count:,}" for pair, count in counts.items() if count)
        for counts in (lineage.data.duplicates, lineage.data.overlaps)
    )
    return (
        f"## Lineage\n\n{_table(('', ''), facts)}\n\n{_table(('file', 'sha256'), files)}\n\n"
        f"Identical examples in two splits: {duplicates or 'none'}. Examples whose prompt another "
        f"split has too: {overlaps or 'none'}."
    )


def _fold_section(check: FoldCheck, lineage: Lineage) -> str:
    reference = "base + adapter"
    if lineage.step is None:  # of no single checkpoint
        reference = "the merge in float32"
    elif METHODS[lineage.config.method.name].whole_model:
        reference = "the trained checkpoint"
    unit = "tokens" if lineage.data.problem is None else "examples"
    text = (
        f"## Fold\n\nWeights are added up in float32 and written in {check.dtype}. On "
        f"{check.tokens} held-out {unit} the logits differ from those of {reference} by at most "
        f"{check.fold_difference:.1e} before rounding (allowed: {check.tolerance:.1e}) and by at "
        f"most {check.written_difference:.1e} as written."
    )
    if check.rounding_tolerance is None:
        return text
    return (
        f"{text} Rounding to {check.dtype} moves them by {check.rounding:.2%} of their spread "
        f"(root mean square; allowed: {check.rounding_tolerance:.2%})."
    )


def _measured_source(data: DataReport, split: str) -> str:
    """The files that a split was read from; a drawn validation split comes from train."""
    own = [source.name for name, source in data.sources.items() if _is_of(name, split)]
    drawn = [source.name for name, source in data.sources.items() if _is_of(name)]
    return ", ".join(own or drawn)


def _is_of(name: str, split: str = "train") -> bool:
    """Whether a source fills a split, alone or as one of several."""
    return name.partition(".")[0] == split


def _metric_name(figure: str, evaluation: Evaluation) -> str:
    if figure == "eval_loss":
        return "loss per label token" if evaluation.reference == "base" else "loss per example"
    return _METRIC_NAMES.get(figure, figure)


def _interval(ends: Sequence[float] | None) -> str:
    return "too few examples" if ends is None else " to ".join(map(_figure, ends))


def _figure(value: float) -> str:
    return f"{value:,.4f}" if abs(value) < 1e6 else f"{value:.3e}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
