"""From config to tokenised splits: once, on the driver, into a cache that all workers map."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raytune_ft.config.data import (
    DataConfig,
    NamedSource,
    SourceConfig,
    difficulty_column,
    source_configs,
    source_names,
)
from raytune_ft.data.cache import keep_folder, tokenizer_sha256
from raytune_ft.data.examples import FORMATS, Encoder, Example, encode_rows
from raytune_ft.data.mixture import hold_out
from raytune_ft.data.overlap import count_overlaps
from raytune_ft.data.report import DataReport, SourceReport, count_duplicates, describe_split
from raytune_ft.data.sources import BATCH_ROWS, Source, open_source
from raytune_ft.data.split import Column, TokenizedSplit
from raytune_ft.data.text_rows import BadRow, Row
from raytune_ft.errors import DataError, RunFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_FORMAT = 2
"""Raise it when the same rows and keys would give other tokens or other files."""

REPORT = "report.json"
BASE_LOSS = "base_loss.npy"
NO_TOKENS = {"path", "weight", "epochs"}
"""Keys of a source that its tokens do not depend on."""
PROGRESS_ROWS = 20_000

Progress = Callable[[str], None]


@dataclass(frozen=True)
class PreparedData:
    """The splits of a run, memory-mapped from `path`.

    `base_loss` is [n] of train: the loss of each example under the model before training, where
    somebody measured it (see `with_base_loss`).
    """

    train: TokenizedSplit
    validation: TokenizedSplit
    test: TokenizedSplit | None
    report: DataReport
    path: Path
    base_loss: Column | None = None


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
    cached = sound_at(target)
    if cached is not None:
        tell(f"data: tokens of an earlier run, {target}")
        return cached
    names = source_names(data)
    examples: dict[str, list[Example]] = {}
    reports: dict[str, SourceReport] = {}
    for name, source in configs.items():
        rows, reports[name] = _tokenise(opened[name], source, data, encoder, tell)
        number = names.index(source.called) if isinstance(source, NamedSource) else 0
        examples.setdefault(name.partition(".")[0], []).extend(
            replace(one, source=number) if number else one for one in rows
        )
    if isinstance(data.validation, float):
        examples["train"], examples["validation"] = hold_out(
            examples["train"], data.validation, seed, names
        )
    splits: dict[str, TokenizedSplit] = {
        name: _split_of(name, examples[name], data, names)
        for name in ("train", "validation", "test")
        if name in examples
    }
    report = DataReport(
        sources=reports,
        splits={name: describe_split(split) for name, split in splits.items()},
        duplicates=count_duplicates(splits),
        overlaps=count_overlaps({name: [one.prompt for one in examples[name]] for name in splits}),
        notes=_notes(encoder, configs.values()),
        names=names,
    )

    def fill(folder: Path) -> None:
        for name, split in splits.items():
            split.write(folder / f"{name}.arrow")
        (folder / REPORT).write_text(report.to_json())

    keep_folder(target, fill, lambda: sound_at(target) is not None)
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
    splits = {
        name: replace(TokenizedSplit.open(path / f"{name}.arrow"), sources=report.names)
        for name in report.splits
    }
    for name, split in splits.items():
        written = report.splits[name]
        if (len(split), len(split.input_ids)) != (written.examples, written.tokens):
            raise RunFailed(f"{path / name}.arrow is not the one that its report describes")
    if not {"train", "validation"} <= splits.keys():
        raise RunFailed(f"{path / REPORT} names no train and validation split")
    losses = path / BASE_LOSS
    return PreparedData(
        splits["train"],
        splits["validation"],
        splits.get("test"),
        report,
        path,
        np.load(losses, allow_pickle=False) if losses.is_file() else None,
    )


def sound_at(path: Path) -> PreparedData | None:
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


def _split_of(
    name: str, rows: list[Example], data: DataConfig, names: tuple[str, ...]
) -> TokenizedSplit:
    written = getattr(data, name)
    columns: dict[str, Column] = {}
    if isinstance(data.train if isinstance(written, float) else written, list):
        columns["source"] = np.array([[one.source] for one in rows], np.float32)
    if name == "train" and difficulty_column(data) is not None:
        columns["difficulty"] = np.array([[one.difficulty] for one in rows], np.float32)
    split = TokenizedSplit.from_examples([(one.ids, one.mask) for one in rows], columns)
    return replace(split, sources=names)


def cache_key(data: DataConfig, opened: dict[str, Source], encoder: Encoder, seed: int) -> str:
    """Hash of everything that the tokens depend on, and of nothing else.

    The directories of a source are left out: a moved data set is the same data set.
    """
    configs = source_configs(data)
    drawn = isinstance(data.validation, float)
    content = {
        "format": CACHE_FORMAT,
        "versions": [version("transformers"), version("tokenizers")],
        "tokenizer": tokenizer_sha256(encoder),
        "seed": seed if drawn else None,
        "validation": data.validation if drawn else None,
        "limits": [data.max_length, data.too_long, data.max_bad_fraction, data.separator],
        "sources": {
            name: [source.name, source.sha256, configs[name].model_dump(exclude=NO_TOKENS)]
            for name, source in opened.items()
        },
    }
    if source_names(data):
        content["names"] = source_names(data)
    if difficulty_column(data) is not None:
        content["difficulty"] = difficulty_column(data)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class _Tally:
    """Counts of one source while it is read."""

    rows: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: dict[str, str] = field(default_factory=dict)
    truncated: int = 0
    dropped: int = 0
    longest: int = 0

    def add_bad(self, row: BadRow) -> None:
        self.bad[row.cause] += 1
        self.first_bad.setdefault(row.cause, f"{row.origin}: {row.detail}")


def _tokenise(
    opened: Source, source: SourceConfig, data: DataConfig, encoder: Encoder, tell: Progress
) -> tuple[list[Example], SourceReport]:
    """The usable examples of one source, and what became of its other rows."""
    tally, examples = _Tally(), list[Example]()
    column = difficulty_column(data) if opened.label.startswith("data.train") else None
    wanted = {} if column is None else {"data.curriculum.column": column}
    rows = opened.rows(FORMATS[source.format].columns(source) | wanted)
    while chunk := list(islice(rows, BATCH_ROWS)):
        results = encode_rows(encoder, source, data.separator, chunk)
        for row, result in zip(chunk, results, strict=True):
            rated = result if column is None else _rated(result, row, column)
            fitted = _fitted(rated, opened.label, data, tally)
            if isinstance(fitted, Example):
                examples.append(fitted)
            elif fitted is not None:
                tally.add_bad(fitted)
        tally.rows += len(chunk)
        if tally.rows % PROGRESS_ROWS == 0:
            tell(f"{opened.label}: {tally.rows:,} rows")
    _refuse_bad(opened, data, tally, len(examples))
    report = SourceReport(
        name=opened.name,
        format=source.format,
        sha256=opened.sha256,
        rows=tally.rows,
        usable=len(examples),
        bad=dict(sorted(tally.bad.items())),
        first_bad=tally.first_bad,
        truncated=tally.truncated,
        dropped=tally.dropped,
        longest=tally.longest,
        tokens=sum(len(one.ids) for one in examples),
        label_tokens=sum(int(one.mask.sum()) for one in examples),
    )
    tell(f"{opened.label}: {_summary(report)}")
    return examples, report


def _rated(result: Example | BadRow, row: Row | BadRow, column: str) -> Example | BadRow:
    """With the number in the column that a curriculum goes by; text formats hold it as text."""
    if isinstance(result, BadRow) or isinstance(row, BadRow):
        return result
    value = row.values[column]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        return BadRow(row.origin, "bad_difficulty", f"{column!r} is no number")
    return replace(result, difficulty=number)


def _fitted(
    result: Example | BadRow, label: str, data: DataConfig, tally: _Tally
) -> Example | BadRow | None:
    """The example within `data.max_length`; None where it was dropped for its length."""
    if isinstance(result, BadRow):
        return result
    length, limit = len(result.ids), data.max_length
    tally.longest = max(tally.longest, length)
    if length > limit:
        if data.too_long == "error":
            raise DataError(
                f"{label}: {result.origin}",
                f"has {length} tokens, over data.max_length={limit}",
                f"shorten it, write data.max_length={length}, or data.too_long=truncate or drop",
            )
        if data.too_long == "drop":
            tally.dropped += 1
            return None
    if not result.mask[:limit].any():
        where = f" within its first {limit} tokens" if length > limit else ""
        return BadRow(result.origin, "no_label_token", f"no token carries loss{where}")
    if length > limit:
        tally.truncated += 1
    return replace(result, ids=result.ids[:limit], mask=result.mask[:limit])


def _refuse_bad(opened: Source, data: DataConfig, tally: _Tally, usable: int) -> None:
    bad = tally.bad.total()
    value = f"{opened.label}.path={opened.name}"
    if bad > data.max_bad_fraction * tally.rows:
        causes = ", ".join(f"{cause} {count:,}" for cause, count in tally.bad.most_common())
        first = next(iter(tally.first_bad.values()))
        raise DataError(
            value,
            f"has {bad:,} unusable rows of {tally.rows:,} ({causes}; the first is {first}), more "
            f"than data.max_bad_fraction={data.max_bad_fraction} allows",
            "mend them or raise data.max_bad_fraction",
        )
    if not usable:
        rule = f"leaves no usable row of {tally.rows:,} ({bad:,} bad, {tally.dropped:,} too long)"
        raise DataError(value, rule, "mend the rows or raise data.max_length")


def _summary(report: SourceReport) -> str:
    facts = [f"{report.usable:,} of {report.rows:,} rows usable", f"{report.tokens:,} tokens"]
    facts += [f"{count:,} {cause}" for cause, count in report.bad.items()]
    if report.truncated:
        facts.append(f"{report.truncated:,} truncated")
    if report.dropped:
        facts.append(f"{report.dropped:,} dropped as too long")
    return ", ".join(facts)


def _notes(encoder: Encoder, sources: Iterable[SourceConfig]) -> tuple[str, ...]:
    notes = []
    if encoder.eos is None:
        notes.append("the tokenizer has no EOS token, so examples end without one")
    template = str(encoder.tokenizer.chat_template or "")
    if "strftime_now" in template and any(source.format == "messages" for source in sources):
        notes.append("the chat template may write today's date into every example")
    return tuple(notes)
