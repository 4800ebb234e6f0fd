"""From config to tokenised splits: once, on the driver, into a cache that all workers map."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raytune_ft.config.data import DataConfig, SourceConfig
from raytune_ft.data.classified import label_names, with_targets
from raytune_ft.data.examples import Encoder, Example
from raytune_ft.data.overlap import count_overlaps
from raytune_ft.data.rationale import RATIONALE
from raytune_ft.data.report import DataReport, SourceReport, count_duplicates, describe_split
from raytune_ft.data.sources import Source, open_source
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.data.tokenise import Progress, tokenise
from raytune_ft.errors import DataError, RunFailed, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_FORMAT = 2
"""Raise it when the same rows and keys would give other tokens or other files."""

REPORT = "report.json"


@dataclass(frozen=True)
class PreparedData:
    """The splits of a run, memory-mapped from `path`."""

    train: TokenizedSplit
    validation: TokenizedSplit
    test: TokenizedSplit | None
    report: DataReport
    path: Path


def prepare_data(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache_dir: Path,
    progress: Progress | None = None,
) -> PreparedData:
    """Tokenise all sources, or take what an earlier call with equal content and keys left.

    Args:
        seed: draws the validation examples where `data.validation` is a fraction.
        progress: gets a line for every source and, in long ones, every 20,000 rows.

    Raises:
        DataError: a source, a row or a column is wrong, or too many rows are.
        StorageError: `cache_dir` cannot be written.
    """
    tell = progress or (lambda line: None)
    encoder = Encoder.of(tokenizer)
    configs = source_configs(data)
    opened = {name: open_source(f"data.{name}", source) for name, source in configs.items()}
    target = cache_dir / cache_key(data, opened, encoder, seed)
    cached = _sound(target)
    if cached is not None:
        tell(f"data: tokens of an earlier run, {target}")
        return cached
    examples: dict[str, list[Example]] = {}
    reports: dict[str, SourceReport] = {}
    for name, source in configs.items():
        examples[name], reports[name] = tokenise(opened[name], source, data, encoder, tell)
    labels: tuple[str, ...] = ()
    if data.train.format == "classification":
        labels = label_names(data, examples["train"])
    if isinstance(data.validation, float):
        examples["train"], examples["validation"] = _drawn(examples["train"], data.validation, seed)
    for name in examples:
        if labels:
            examples[name] = with_targets(name, examples[name], data, labels)
        elif name != "train":  # measured by the answers alone
            examples[name] = [one for one in examples[name] if one.columns.get(RATIONALE) != (1.0,)]
    splits: dict[str, TokenizedSplit] = {
        name: split_of(examples[name])
        for name in ("train", "validation", "test")
        if name in examples
    }
    report = DataReport(
        sources=reports,
        splits={name: describe_split(split) for name, split in splits.items()},
        duplicates=count_duplicates(splits),
        overlaps=count_overlaps({name: [one.prompt for one in examples[name]] for name in splits}),
        notes=_notes(encoder, configs.values()),
        labels=labels,
        problem=data.problem if labels else None,
    )
    try:
        _write(splits, report, target)
    except OSError as error:
        remedy = "write a storage with room that this user may write"
        raise StorageError(str(cache_dir), f"cannot hold tokens ({error})", remedy) from error
    return open_prepared(target)


def open_prepared(path: Path) -> PreparedData:
    """Map what `prepare_data` left at `path`; cheap, so that every worker calls it.

    Raises:
        RunFailed: a file is missing, cut short, or not the one that the report describes.
    """
    try:
        report = DataReport.from_json((path / REPORT).read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFailed(f"{path / REPORT} cannot be read as a data report: {error}") from error
    splits = {name: TokenizedSplit.open(path / f"{name}.arrow") for name in report.splits}
    for name, split in splits.items():
        written = report.splits[name]
        if (len(split), len(split.input_ids)) != (written.examples, written.tokens):
            raise RunFailed(f"{path / name}.arrow is not the one that its report describes")
    if not {"train", "validation"} <= splits.keys():
        raise RunFailed(f"{path / REPORT} names no train and validation split")
    return PreparedData(splits["train"], splits["validation"], splits.get("test"), report, path)


def source_configs(data: DataConfig) -> dict[str, SourceConfig]:
    """The sources that are read, by the split that they fill."""
    sources = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: one for name, one in sources.items() if isinstance(one, SourceConfig)}


def split_of(examples: Sequence[Example]) -> TokenizedSplit:
    """With the columns of the examples, which all have the same."""
    names = examples[0].columns if examples else ()
    columns = {
        name: np.array([one.columns[name] for one in examples], np.float32) for name in names
    }
    return TokenizedSplit.from_examples([(one.ids, one.mask) for one in examples], columns)


def _drawn(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Train and validation. Examples of one row stay together, but for those of an only row."""
    rows = [list(group) for _, group in groupby(examples, lambda one: one.origin)]
    if len(rows) == 1:
        rows = [[one] for one in rows[0]]
    train, validation = draw_validation(len(rows), fraction, seed)
    return [one for i in train for one in rows[i]], [one for i in validation for one in rows[i]]


def draw_validation(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for train and for validation out of `count` examples, both in ascending order.

    Raises:
        DataError: one of the two would be empty.
    """
    if count < 2:
        raise DataError(
            f"data.validation={fraction}",
            f"cannot be drawn from {count} usable train example",
            "write at least 2 train rows, or a validation source",
        )
    size = min(max(1, round(count * fraction)), count - 1)
    order = np.random.default_rng(seed).permutation(count)
    return sorted(order[size:].tolist()), sorted(order[:size].tolist())


def cache_key(data: DataConfig, opened: dict[str, Source], encoder: Encoder, seed: int) -> str:
    """Hash of everything that the tokens depend on, and of nothing else.

    The directories of a source are left out: a moved data set is the same data set.
    """
    configs = source_configs(data)
    drawn = isinstance(data.validation, float)
    content = {
        "format": CACHE_FORMAT,
        "versions": [version("transformers"), version("tokenizers")],
        "tokenizer": _tokenizer_sha256(encoder),
        "seed": seed if drawn else None,
        "validation": data.validation if drawn else None,
        "limits": [data.max_length, data.too_long, data.max_bad_fraction, data.separator],
        "chunk": data.chunk.overlap if data.chunk is not None else None,
        "labels": [data.problem, data.labels],
        "sources": {
            name: [source.name, source.sha256, configs[name].model_dump(exclude={"path"})]
            for name, source in opened.items()
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tokenizer_sha256(encoder: Encoder) -> str:
    """Of the files that the tokenizer saves, whatever its kind.

    tokenizer_config.json is left out, because it also says how the tokenizer was loaded; what
    tokens depend on in it is taken from the object.
    """
    tokenizer = encoder.tokenizer
    facts = [encoder.prefix, encoder.eos, tokenizer.chat_template, tokenizer.special_tokens_map]
    digest = hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file() and file.name != "tokenizer_config.json":
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _notes(encoder: Encoder, sources: Iterable[SourceConfig]) -> tuple[str, ...]:
    notes = []
    if encoder.eos is None:
        notes.append("the tokenizer has no EOS token, so examples end without one")
    template = str(encoder.tokenizer.chat_template or "")
    if "strftime_now" in template and any(source.format == "messages" for source in sources):
        notes.append("the chat template may write today's date into every example")
    return tuple(notes)


def _sound(path: Path) -> PreparedData | None:
    """What lies at `path`, if every token of it is what the report says."""
    if not path.is_dir():
        return None
    try:
        prepared = open_prepared(path)
    except RunFailed:
        return None
    splits = {"train": prepared.train, "validation": prepared.validation, "test": prepared.test}
    for name, split in splits.items():
        if split is not None and split.sha256 != prepared.report.splits[name].sha256:
            return None
    return prepared


def _write(splits: dict[str, TokenizedSplit], report: DataReport, target: Path) -> None:
    """Write beside `target`, then rename: two processes may do so at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=".building-", ignore_cleanup_errors=True
    ) as name:
        folder = Path(name) / "data"
        folder.mkdir()
        for split_name, split in splits.items():
            split.write(folder / f"{split_name}.arrow")
        (folder / REPORT).write_text(report.to_json())
        while True:
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
            else:
                return
            if _sound(target) is not None:
                return
            # Damaged: out of the way first. Another process may be quicker, which is as good.
            aside = target.with_name(f".damaged-{uuid.uuid4().hex}")
            with suppress(FileNotFoundError):
                target.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
