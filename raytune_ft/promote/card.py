"""The model card: what was made, from what, by what, how good it is, how to load it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

import raytune_ft
from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.data.report import DataReport
from raytune_ft.model.build import resolve_model_path
from raytune_ft.promote.fold import FoldCheck

PACKAGES = ("torch", "transformers", "peft", "ray")
_HASHED = (".safetensors", ".json", ".model", ".jinja")
_METRIC_NAMES = {
    "eval_loss": "loss per label token",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
}


@dataclass(frozen=True)
class Evaluation:
    """`evaluation.json`; `looks` counts how often this test split has been measured."""

    split: str
    examples: int
    base: dict[str, float]
    promoted: dict[str, float]
    looks: int
    verdict: str


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with its reference, and how base and promoted model continue it."""

    prompt: str
    reference: str
    base: str
    promoted: str


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
    step: int
    examples: int
    versions: dict[str, str]


def base_name(model: ModelConfig) -> str:
    """The hub id or `builtin:` name; of a local directory its last part alone."""
    return Path(model.path).name if Path(model.path).is_absolute() else model.path


def base_file_hashes(model: ModelConfig) -> dict[str, str]:
    """File name -> sha256 of the base's weights, configuration and tokenizer."""
    directory = Path(resolve_model_path(model.path))
    if not directory.is_dir():
        revision = model.revision or "main"
        cached = try_to_load_from_cache(model.path, "config.json", revision=revision)
        if not isinstance(cached, str):
            return {}
        directory = Path(cached).parent
    hashes = {}
    for file in sorted(directory.iterdir()):
        if file.suffix in _HASHED and file.is_file():
            with file.open("rb") as opened:
                hashes[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


def package_versions() -> dict[str, str]:
    """What the fold and the evaluation ran with."""
    return {"raytune_ft": raytune_ft.__version__} | {name: version(name) for name in PACKAGES}


def model_card(
    lineage: Lineage, evaluation: Evaluation, check: FoldCheck, samples: Sequence[Sample]
) -> ModelCard:
    """The card as `huggingface_hub` reads it: YAML metadata, then Markdown."""
    config = lineage.config
    is_hub_id = base_name(config.model) == config.model.path and ":" not in config.model.path
    data = ModelCardData(
        model_name=lineage.name,
        base_model=config.model.path if is_hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["raytune_ft", config.method.name],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="custom",
                dataset_name=_measured_source(lineage.data, evaluation.split),
                dataset_split=evaluation.split,
                metric_type=name,
                metric_name=_METRIC_NAMES[name],
                metric_value=value,
            )
            for name, value in evaluation.promoted.items()
        ],
    )
    body = "\n\n".join(
        [
            f"# {lineage.name}",
            f"{base_name(config.model)}, fine-tuned with raytune_ft (method {config.method.name}).",
            f"**Verdict: {evaluation.verdict}.**",
            _evaluation_section(evaluation),
            _samples_section(samples),
            _loading_section(),
            _lineage_section(lineage),
            _fold_section(check, config.method.name),
        ]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _evaluation_section(evaluation: Evaluation) -> str:
    rows = [
        (_METRIC_NAMES[name], _figure(base), _figure(evaluation.promoted[name]))
        for name, base in evaluation.base.items()
    ]
    looks = f"measured {evaluation.looks} time{'s' if evaluation.looks > 1 else ''} so far"
    caution = (
        ""
        if evaluation.split == "test"
        else " There was no test data: these examples also chose the model, so the figures flatter."
    )
    return (
        f"## Evaluation\n\nOn {evaluation.examples:,} examples of the {evaluation.split} split, "
        f"{looks}.{caution}\n\n{_table(('metric', 'base', 'promoted'), rows)}"
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


def _loading_section() -> str:
    return (
        "## Use\n\nThe directory `model` beside this file is a plain Hugging Face model:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("promoted/model")\n'
        'tokenizer = AutoTokenizer.from_pretrained("promoted/model")\n```'
    )


def _lineage_section(lineage: Lineage) -> str:
    facts = [
        ("base model", base_name(lineage.config.model)),
        ("config sha256", lineage.config_sha256),
        ("seed", str(lineage.config.seed)),
        ("trained for", f"{lineage.examples:,} examples, {lineage.step:,} steps"),
    ]
    if lineage.config.model.revision:
        facts.insert(1, ("revision", lineage.config.model.revision))
    if lineage.trial is not None:
        facts.append(("trial", lineage.trial))
    facts += [(key, str(value)) for key, value in lineage.params.items()]
    facts += [(f"version of {name}", found) for name, found in lineage.versions.items()]
    files = [(f"base: {name}", digest) for name, digest in lineage.base_files.items()]
    files += [
        (f"data.{split}: {source.name}", source.sha256)
        for split, source in lineage.data.sources.items()
    ]
    duplicates = ", ".join(
        f"{pair} {count:,}" for pair, count in lineage.data.duplicates.items() if count
    )
    return (
        f"## Lineage\n\n{_table(('', ''), facts)}\n\n{_table(('file', 'sha256'), files)}\n\n"
        f"Identical examples in two splits: {duplicates or 'none'}."
    )


def _fold_section(check: FoldCheck, method: str) -> str:
    reference = "the trained checkpoint" if method == "full" else "base + adapter"
    text = (
        f"## Fold\n\nWeights are added up in float32 and written in {check.dtype}. On "
        f"{check.tokens} held-out tokens the logits differ from those of {reference} by at most "
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
    """The file that a split was read from; a drawn validation split comes from train."""
    return data.sources.get(split, data.sources["train"]).name


def _figure(value: float) -> str:
    return f"{value:,.4f}" if abs(value) < 1e6 else f"{value:.3e}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
