"""The model card of a promotion: scores, lineage, and how to load the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, RepoCard

import raytune_ft
from raytune_ft.config.data import source_configs
from raytune_ft.config.methods import METHODS
from raytune_ft.config.metrics import RETENTION, label
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.data.report import DataReport
from raytune_ft.format import some_of
from raytune_ft.merge.verify import FoldCheck
from raytune_ft.promote.decide import Evaluation, Sample
from raytune_ft.records import as_json
from raytune_ft.report import tables

PACKAGES = ("torch", "transformers", "peft", "ray")


@dataclass(frozen=True)
class Lineage:
    """Where a promoted model comes from: names and hashes, no paths of this machine.

    Attributes:
        base_files: file of the base model -> its SHA-256.
        trial, params, step, examples: of the promoted checkpoint; None, or empty, where the model
            is not a single checkpoint.
        versions: package -> version.
    """

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
    """The hub id or `builtin:` name; for a local directory the last part of its path."""
    return Path(model.path).name if Path(model.path).is_absolute() else model.path


def known_license(directory: Path) -> str | None:
    """The licence in the model or dataset card of a directory; None where there is none."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    try:
        found = RepoCard.load(card).data.to_dict().get("license")
    except (OSError, ValueError):  # a README that is not a card
        return None
    return str(found) if found else None


def licenses(config: Config) -> dict[str, str]:
    """`base`, `data.train`, ... -> licence, of those that have a card with one beside them."""
    places = {"base": config.model.path} | {
        f"data.{name}": str(Path(source.paths[0]).parent)
        for name, source in source_configs(config.data).items()
    }
    found = {name: known_license(Path(place)) for name, place in places.items()}
    return {name: text for name, text in found.items() if text is not None}


def package_versions() -> dict[str, str]:
    """Versions of the packages that fold and evaluate."""
    return {"raytune_ft": raytune_ft.__version__} | {name: version(name) for name in PACKAGES}


MAX_LABELS = 50
"""Labels that the card lists; `config.json` has all of them."""


def model_card(
    lineage: Lineage,
    evaluation: Evaluation,
    check: FoldCheck | None,
    samples: Sequence[Sample],
    unfolded: str | None,
) -> ModelCard:
    """The card as `huggingface_hub` reads it: YAML metadata, then Markdown.

    Args:
        check: None where nothing was folded.
        unfolded: the kind of adapter where the adapter was promoted without folding.
    """
    config = lineage.config
    known = licenses(config)
    facts = OBJECTIVES[config.train.objective]
    classifies = facts.head
    task = "text-classification" if classifies else "text-generation"
    is_hub_id = base_name(config.model) == config.model.path and ":" not in config.model.path
    record = as_json(evaluation)
    unit = "pair" if facts.pairs else "example" if facts.head else "label token"
    label = partial(_metric_name, unit=unit)
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
                metric_name=label(name),
                metric_value=value,
            )
            for name, value in evaluation.promoted.items()
            if name not in RETENTION
            and "/" not in name  # those are of other data
            and math.isfinite(value)
        ],
    )
    body = "\n\n".join(
        [
            f"# {lineage.name}",
            f"{base_name(config.model)}, fine-tuned with raytune_ft (method {config.method.name}).",
            f"**Verdict: {evaluation.verdict}.**",
            _evaluation_section(record, label),
            _candidates_section(record, label),
            _samples_section(samples)
            if not classifies
            else REWARD_SECTION
            if facts.pairs
            else _labels_section(lineage.data),
            _loading_section(classifies)
            if unfolded is None
            else _adapter_section(unfolded, config.model),
            _lineage_section(lineage, known),
            "" if check is None else _fold_section(check, lineage),
        ]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _evaluation_section(evaluation: tables.Record, label: tables.Label) -> str:
    about = [
        f"On {tables.measured_on(evaluation)}.",
        *tables.caveats(evaluation),
        "Intervals are of a paired bootstrap over examples.",
    ]
    table = tables.markdown(tables.figures(evaluation, label))
    return f"## Evaluation\n\n{' '.join(about)}\n\n{table}"


def _candidates_section(evaluation: tables.Record, label: tables.Label) -> str:
    return (
        f"## Candidates\n\nCompared on {evaluation['validation_examples']:,} examples of the "
        "validation split only. Of the candidates that the data do not separate from the best "
        f"one, the simplest is promoted.\n\n{tables.markdown(tables.candidates(evaluation, label))}"
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


REWARD_SECTION = (
    "## Reward\n\nOne number for a prompt with an answer, with the EOS token at the end. Of two "
    "answers to one prompt the one with the larger number is better; numbers for different prompts "
    "do not compare."
)


def _labels_section(data: DataReport) -> str:
    """The labels of the head's outputs, in order."""
    what = {
        "single_label": "One label per example: the largest output; its softmax is the confidence",
        "multi_label": "Any number of labels per example: the outputs above 0",
    }.get(data.problem or "", "Numbers, as they are in the data")
    names = [label.replace("\n", " ") for label in data.labels]
    return f"## Labels\n\n{what}. In their order: {some_of(names, MAX_LABELS)}."


def _loading_section(classifies: bool) -> str:
    kind = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
    return (
        "## Use\n\nThe directory `model` beside this file is a plain Hugging Face model:\n\n"
        f"```python\nfrom transformers import {kind}, AutoTokenizer\n\n"
        f'model = {kind}.from_pretrained("promoted/model")\n'
        'tokenizer = AutoTokenizer.from_pretrained("promoted/model")\n```'
    )


def _adapter_section(kind: str, base: ModelConfig) -> str:
    """How to load an adapter, which needs its base."""
    path = base_name(base)
    if kind.isupper():  # a type of PEFT
        return (
            "## Use\n\nThe directory `adapter` beside this file is a PEFT adapter. It changes "
            "activations and cannot be folded into weights:\n\n"
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, "
            "AutoTokenizer\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{path}")\n'
            'model = PeftModel.from_pretrained(base, "promoted/adapter")\n'
            'tokenizer = AutoTokenizer.from_pretrained("promoted/adapter")\n```'
        )
    return (
        f"## Use\n\nThe directory `adapter` beside this file holds the method `{kind}` in "
        "safetensors and JSON. It changes activations and cannot be folded into weights. "
        f"`docs/interventions.md` of raytune_ft shows how to apply it to {path} with "
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
        f"## Lineage\n\n{_pairs(('', ''), facts)}\n\n{_pairs(('file', 'sha256'), files)}\n\n"
        f"Identical examples in two splits: {duplicates or 'none'}. Examples whose prompt another "
        f"split has too: {overlaps or 'none'}."
    )


def _fold_section(check: FoldCheck, lineage: Lineage) -> str:
    reference = "base + adapter"
    if lineage.step is None:  # a merge
        reference = "the merge in float32"
    elif METHODS[lineage.config.method.name].whole_model:
        reference = "the trained checkpoint"
    unit = "examples" if OBJECTIVES[lineage.config.train.objective].head else "tokens"
    text = (
        f"## Fold\n\nWeights are added in float32 and written in {check.dtype}. On "
        f"{check.tokens} held-out {unit} the logits differ from those of {reference} by at most "
        f"{check.fold_difference:.1e} before rounding (allowed: {check.tolerance:.1e}) and by at "
        f"most {check.written_difference:.1e} as written."
    )
    if check.rounding_tolerance is None:
        return text
    return (
        f"{text} Rounding to {check.dtype} changes them by {check.rounding:.2%} of their spread "
        f"(root mean square; allowed: {check.rounding_tolerance:.2%})."
    )


def _measured_source(data: DataReport, split: str) -> str:
    """The files of a split; a validation split drawn from train has those of train."""
    own = [source.name for name, source in data.sources.items() if _is_of(name, split)]
    drawn = [source.name for name, source in data.sources.items() if _is_of(name)]
    return ", ".join(own or drawn)


def _is_of(name: str, split: str = "train") -> bool:
    """Whether a source, such as `train.maths`, belongs to a split."""
    return name.partition(".")[0] == split


def _metric_name(figure: str, unit: str) -> str:
    return f"loss per {unit}" if figure == "eval_loss" else label(figure)


def _pairs(columns: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    return tables.markdown(tables.Table(columns, tuple(rows)))
