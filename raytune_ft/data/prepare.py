"""From the config to tokenised splits: once, on the driver, in a cache that all workers map."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raytune_ft.config.data import (
    CHAT_TEMPLATES,
    FORMATS,
    DataConfig,
    NamedSource,
    SourceConfig,
    chat_template_of,
    difficulty_column,
    source_configs,
    source_names,
)
from raytune_ft.config.reference import one_of
from raytune_ft.data.formats import WEIGHT, Encoder, Example, found_format
from raytune_ft.data.formats.classification import label_names, with_targets
from raytune_ft.data.formats.rationale import RATIONALE
from raytune_ft.data.formats.unpaired import partners_of
from raytune_ft.data.order import hold_out
from raytune_ft.data.report import (
    DataReport,
    SourceReport,
    count_duplicates,
    count_overlaps,
    describe_pairs,
    describe_split,
)
from raytune_ft.data.sources import Source, open_source
from raytune_ft.data.split import Column, TokenizedSplit
from raytune_ft.data.tokenise import Progress, tokenise
from raytune_ft.errors import DataError, RunFailed, StorageError, first_line
from raytune_ft.files import sha256_of
from raytune_ft.layout import (
    BASE_LOSS,
    DATA_REPORT,
    TEACHER_LOGITS,
    partners_name,
    prompts_file,
    reference_file,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE = "reference"
"""The label column of the log-probabilities under the reference."""

CACHE_FORMAT = 3
"""To be raised when the same rows and keys give other tokens or other files."""

NO_TOKENS = {"path", "weight", "epochs"}
"""Keys of a source on which its tokens do not depend."""


def tokenizer_sha256(encoder: Encoder) -> str:
    """Hash of the files that the tokenizer saves, whatever its kind.

    tokenizer_config.json is left out, because it also holds how the tokenizer was loaded; the keys
    that tokens depend on are read from the object.
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


def keep_folder(target: Path, fill: Callable[[Path], None], is_sound: Callable[[], bool]) -> None:
    """Let `fill` write a folder, which becomes `target`, unless a sound one has appeared there.

    Raises:
        StorageError: the disk is full, or the folder is not writable.
    """
    try:
        _write(target, fill, is_sound)
    except OSError as error:
        remedy = "write a storage with room that this user may write"
        raise StorageError(str(target.parent), f"cannot hold tokens ({error})", remedy) from error


def _write(target: Path, fill: Callable[[Path], None], is_sound: Callable[[], bool]) -> None:
    """Write beside `target`, then rename: two processes may do so at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=".building-", ignore_cleanup_errors=True
    ) as name:
        folder = Path(name) / "data"
        folder.mkdir()
        fill(folder)
        while True:
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
            else:
                return
            if is_sound():
                return
            # Damaged: move it away first. Another process may already have done so.
            aside = target.with_name(f".damaged-{uuid.uuid4().hex}")
            with suppress(FileNotFoundError):
                target.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class PreparedData:
    """The splits of a run, memory-mapped from `path`.

    `base_loss` is [n]: the loss of each training example under the model before training, if it was
    measured (see `with_base_loss`). `teacher_logits` is [label tokens of train, vocabulary], if
    they are kept (see `with_teacher_logits`).
    """

    train: TokenizedSplit
    validation: TokenizedSplit
    test: TokenizedSplit | None
    report: DataReport
    path: Path
    base_loss: Column | None = None
    teacher_logits: npt.NDArray[Any] | None = None

    @property
    def splits(self) -> tuple[TokenizedSplit, ...]:
        """Those that there are."""
        return tuple(s for s in (self.train, self.validation, self.test) if s is not None)

    @property
    def extent(self) -> tuple[int, int]:
        """The lengths of the shortest and of the longest sequence."""
        lengths = [np.diff(split.part_offsets) for split in self.all_splits.values()]
        return int(min(map(np.min, lengths))), int(max(map(np.max, lengths)))

    @property
    def widest(self) -> int:
        """The tokens of the longest example, whose sequences share a row where rows are packed."""
        return max(int(split.lengths.max(initial=0)) for split in self.all_splits.values())

    @property
    def all_splits(self) -> dict[str, TokenizedSplit]:
        """All splits by name, and the partners of each."""
        own = {name: getattr(self, name) for name in self.report.splits}
        beside = {partners_name(name): split.partners for name, split in own.items()}
        return own | {name: split for name, split in beside.items() if split is not None}


def prepare_data(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache_dir: Path,
    progress: Progress | None = None,
) -> PreparedData:
    """Tokenise all sources, or reuse what an earlier call with the same content and keys left.

    Args:
        seed: draws the validation examples where `data.validation` is a fraction.
        progress: gets a line for every source, and every 20,000 rows of long ones.

    Raises:
        DataError: a source or a column is wrong, or too many rows are unusable.
        StorageError: `cache_dir` cannot be written.
    """
    tell = progress or (lambda line: None)
    use_chat_template(tokenizer, data)
    encoder = Encoder.of(tokenizer)
    written = source_configs(data)
    opened = {name: open_source(f"data.{name}", source) for name, source in written.items()}
    configs = {
        name: found_format(f"data.{name}", source, opened[name]) for name, source in written.items()
    }
    for name, source in configs.items():
        if source is not written[name]:
            tell(f"data.{name}: read as format: {source.format}")
    target = cache_dir / cache_key(data, configs, opened, encoder, seed)
    cached = sound_at(target)
    if cached is not None:
        tell(f"data: tokens of an earlier run, {target}")
        return cached
    names = source_names(data)
    examples: dict[str, list[Example]] = {}
    reports: dict[str, SourceReport] = {}
    for name, source in configs.items():
        rows, reports[name] = tokenise(opened[name], source, data, encoder, tell)
        number = names.index(source.called) if isinstance(source, NamedSource) else 0
        examples.setdefault(name.partition(".")[0], []).extend(
            replace(one, source=number) if number else one for one in rows
        )
    labels: tuple[str, ...] = ()
    if any(FORMATS[source.format].labels for source in configs.values()):
        labels = label_names(data, examples["train"])
    if isinstance(data.validation, float):
        examples["train"], examples["validation"] = hold_out(
            examples["train"], data.validation, seed, names
        )
    for name in examples:
        if labels:
            examples[name] = with_targets(name, examples[name], data, labels)
        elif name != "train":  # only the answers are measured
            examples[name] = [one for one in examples[name] if one.columns.get(RATIONALE) != (1.0,)]
    splits: dict[str, TokenizedSplit] = {
        name: split_of(name, examples[name], data, names)
        for name in ("train", "validation", "test")
        if name in examples
    }
    if any(FORMATS[source.format].partners for source in configs.values()):
        for name, split in splits.items():
            partners = partners_of(split, seed, data.max_length)
            splits[name] = replace(split, partners=partners)
    report = DataReport(
        sources=reports,
        splits={name: describe_split(split) for name, split in splits.items()},
        pairs={
            name: describe_pairs(split, [one.prompt for one in examples[name]])
            for name, split in splits.items()
            if split.parts > 1
        },
        duplicates=count_duplicates(splits),
        overlaps=count_overlaps({name: [one.prompt for one in examples[name]] for name in splits}),
        notes=_notes(encoder, configs.values(), reports.values()),
        names=names,
        labels=labels,
        problem=data.problem if labels else None,
    )

    for name, pairs in report.pairs.items():
        tell(f"data.{name}: {pairs}")

    def fill(folder: Path) -> None:
        for name, split in splits.items():
            split.write(folder / f"{name}.arrow")
            if split.partners is not None:
                split.partners.write(folder / f"{partners_name(name)}.arrow")
        (folder / DATA_REPORT).write_text(report.to_json())

    keep_folder(target, fill, lambda: sound_at(target) is not None)
    return open_prepared(target)


def open_prepared(path: Path) -> PreparedData:
    """Map what `prepare_data` left at `path`; cheap enough for every worker.

    Raises:
        RunFailed: a file is missing, cut short, or not the one that the report describes.
    """
    try:
        report = DataReport.from_json((path / DATA_REPORT).read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFailed(f"{path / DATA_REPORT} cannot be read as a data report: {error}") from error
    splits = {
        name: replace(TokenizedSplit.open(path / f"{name}.arrow"), sources=report.names)
        for name in report.splits
    }
    for name in splits:
        own = path / f"{partners_name(name)}.arrow"
        if own.is_file():
            partners = _with_reference(path, partners_name(name), TokenizedSplit.open(own), report)
            splits[name] = replace(splits[name], partners=partners)
        splits[name] = _with_reference(path, name, splits[name], report)
    for name, split in splits.items():
        written = report.splits[name]
        if (len(split), len(split.input_ids)) != (written.examples, written.tokens):
            raise RunFailed(f"{path / name}.arrow is not the one that its report describes")
    if not {"train", "validation"} <= splits.keys():
        raise RunFailed(f"{path / DATA_REPORT} lacks a train or a validation split")
    return PreparedData(
        splits["train"],
        splits["validation"],
        splits.get("test"),
        report,
        path,
        None if report.base_loss is None else _mapped(path / BASE_LOSS, len(splits["train"])),
        None
        if report.teacher_logits is None
        else _mapped(path / TEACHER_LOGITS, int(splits["train"].label_counts.sum())),
    )


def _with_reference(
    path: Path, name: str, split: TokenizedSplit, report: DataReport
) -> TokenizedSplit:
    """The split with the log-probabilities of its label tokens under the reference, where known."""
    if name not in report.reference_files:
        return split
    logps_N = _mapped(path / reference_file(name), int(split.part_labels[-1]))
    return replace(split, label_columns={REFERENCE: logps_N})


def _mapped(path: Path, rows: int) -> npt.NDArray[Any]:
    """The array in the file, whose pages are read on first use."""
    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RunFailed(f"{path} cannot be read as numbers: {error}") from error
    if len(found) != rows:
        raise RunFailed(f"{path} has {len(found):,} rows, which are not those of its split")
    return found


def sound_at(path: Path) -> PreparedData | None:
    """The data at `path`, if its tokens, losses and logits have the hashes in its report."""
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
    losses = prepared.base_loss
    if losses is not None and sha256_of_numbers(losses) != prepared.report.base_loss:
        return None
    written_files = {
        **{reference_file(name): each for name, each in prepared.report.reference_files.items()},
        **{prompts_file(name): each for name, each in prepared.report.prompt_files.items()},
    }
    for name, sha256 in written_files.items():
        if not (path / name).is_file() or sha256_of(path / name) != sha256:
            return None
    written = prepared.report.teacher_logits
    if written is not None and sha256_of(path / TEACHER_LOGITS) != written:
        return None
    return prepared


def sha256_of_numbers(numbers: npt.NDArray[Any]) -> str:
    """Hash of an array's bytes, without a file header."""
    return hashlib.sha256(numbers.tobytes()).hexdigest()


def derived(
    prepared: PreparedData, sha256: str, add: Callable[[Path], dict[str, Any]]
) -> PreparedData:
    """`prepared` with the files that `add` writes into a folder of their own, named by `sha256`; or
    what an earlier call with that hash left. `add` returns the changed fields of the report.

    Raises:
        StorageError: they cannot be written.
    """
    named = f"{prepared.path.name} {sha256}"
    target = prepared.path.with_name(hashlib.sha256(named.encode()).hexdigest())
    found = sound_at(target)
    if found is not None:
        return found

    def fill(folder: Path) -> None:
        for file in prepared.path.iterdir():
            shutil.copyfile(file, folder / file.name)
        report = replace(prepared.report, **add(folder))
        (folder / DATA_REPORT).write_text(report.to_json())

    keep_folder(target, fill, lambda: sound_at(target) is not None)
    return open_prepared(target)


def split_of(
    name: str, rows: Sequence[Example], data: DataConfig, names: tuple[str, ...] = ()
) -> TokenizedSplit:
    """The split of these examples, with every column that one of them has.

    Examples without a weight weigh 1; any other column that an example lacks is 0.
    """
    written = getattr(data, name)
    known = {column: values for one in rows for column, values in one.columns.items()}
    columns: dict[str, Column] = {}
    for column, values in known.items():
        absent = (float(column == WEIGHT),) * len(values)
        columns[column] = np.array([one.columns.get(column, absent) for one in rows], np.float32)
    if isinstance(data.train if isinstance(written, float) else written, list):
        columns["source"] = np.array([[one.source] for one in rows], np.float32)
    if name == "train" and difficulty_column(data) is not None:
        columns["difficulty"] = np.array([[one.difficulty] for one in rows], np.float32)
    split = TokenizedSplit.from_examples([(one.ids, one.mask) for one in rows], columns)
    return replace(split, sources=names)


def use_chat_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    """Give the tokenizer the chat template that the sources name, if they do.

    Raises:
        DataError: it is no file that can be read.
    """
    written = chat_template_of(data)
    if written is None:
        return
    if written in CHAT_TEMPLATES:
        path = Path(__file__).parent / "chat_templates" / f"{written}.jinja"
    else:
        path = Path(written)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.*.chat_template={written}",
            f"is not a file that can be read ({first_line(error)})",
            f"write a file with a Jinja template, or {one_of(CHAT_TEMPLATES)}",
        ) from error
    if written == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
        # The model knows no such token, and ends what it says with EOS.
        text = text.replace("'<|im_end|>'", "eos_token")
    tokenizer.chat_template = text


def cache_key(
    data: DataConfig,
    configs: Mapping[str, SourceConfig],
    opened: Mapping[str, Source],
    encoder: Encoder,
    seed: int,
) -> str:
    """Hash of everything that the tokens depend on.

    The directories of a source are left out: a moved data set is the same data set.
    """
    drawn = isinstance(data.validation, float)
    partnered = any(FORMATS[source.format].partners for source in configs.values())
    content = {
        "format": CACHE_FORMAT,
        "versions": [version("transformers"), version("tokenizers")],
        "tokenizer": tokenizer_sha256(encoder),
        "seed": seed if drawn or partnered else None,
        "validation": data.validation if drawn else None,
        "limits": [data.max_length, data.too_long, data.max_bad_fraction, data.separator],
        "chunk": data.chunk.overlap if data.chunk is not None else None,
        "labels": [data.problem, data.labels],
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


def _notes(
    encoder: Encoder, sources: Iterable[SourceConfig], reports: Iterable[SourceReport]
) -> tuple[str, ...]:
    notes = []
    if encoder.eos is None:
        notes.append("the tokenizer has no EOS token, so examples end without one")
    template = str(encoder.tokenizer.chat_template or "")
    templated = any(FORMATS[source.format].chat_template for source in sources)
    if "strftime_now" in template and templated:
        notes.append("the chat template may write today's date into every example")
    ends = {end for report in reports for end in report.ends}
    if ends == {""}:
        notes.append(
            "no trained turn ends with a special token, so generation does not know where to end"
        )
    return tuple(notes)
