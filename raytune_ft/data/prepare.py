"""From the config to tokenised splits: once, in a cache that all workers map.

Parts of the sources are tokenised apart from each other, in any processes and in any order
(`tokenise.py`). The driver adds up what they counted, draws the splits, and copies the tokens block
by block: what it has for each example lies on disk (`arrays.py`), but for a byte or two.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import combinations
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
from raytune_ft.data.arrays import Indices, numbered, spans, summed, taken, token_spans
from raytune_ft.data.formats import WEIGHT, Encoder, found_format
from raytune_ft.data.formats.classification import (
    TARGET,
    check_all_seen,
    fill_targets,
    label_names,
    refuse_labels,
)
from raytune_ft.data.formats.rationale import RATIONALE
from raytune_ft.data.formats.unpaired import write_partners
from raytune_ft.data.matches import Matches, count_matches, first_equal, keyed
from raytune_ft.data.order import Drawable, hold_out
from raytune_ft.data.parts import Examples, Part, columns_of
from raytune_ft.data.prepared import (
    PreparedData,
    cannot_hold,
    keep_folder,
    open_prepared,
    sound_at,
    write_rows,
)
from raytune_ft.data.processes import LocalProcesses, Workers
from raytune_ft.data.report import (
    DataReport,
    SourceReport,
    SplitReport,
    describe_pairs,
    length_counts,
    source_counts,
)
from raytune_ft.data.sources import Source, open_source
from raytune_ft.data.split import Column, Mask, TokenIds, TokenizedSplit, write_split
from raytune_ft.data.tokenise import Tally, Work, bytes_per_byte, reported, summary
from raytune_ft.errors import DataError, InputError, StorageError, first_line
from raytune_ft.format import size
from raytune_ft.layout import (
    DATA_REPORT,
    partners_name,
    rows_file,
)
from raytune_ft.locks import WAIT, Wait, locked
from raytune_ft.records import Tell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_FORMAT = 5
"""To be raised when the same rows and keys give other tokens or other files."""

SPLITS = ("train", "validation", "test")
PROGRESS_ROWS = 20_000
ROOM_CHECKED = 64 * 2**20
"""Bytes of text of a source up to which any disk has room for its tokens."""

NO_TOKENS = {"path", "revision", "weight", "epochs"}
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


def prepare_data(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache_dir: Path,
    progress: Tell | None = None,
    workers: Workers | None = None,
    piece_bytes: int | None = None,
) -> PreparedData:
    """Tokenise all sources, or reuse what an earlier call with the same content and keys left.

    Args:
        seed: draws the validation examples where `data.validation` is a fraction.
        progress: gets a line for every source, and every 20,000 rows of long ones.
        workers: what makes the parts; by default processes of this machine where there is much
            text.
        piece_bytes: the most text of a part; by default it depends on the size of the source. The
            result does not depend on either.

    Raises:
        DataError: a source or a column is wrong, or too many rows are unusable.
        StorageError: `cache_dir` cannot be written, or has no room.
        RunFailed: the processes that make a part die again and again.
    """
    tell = progress or (lambda line: None)
    use_chat_template(tokenizer, data)
    encoder = Encoder.of(tokenizer)
    written = source_configs(data)
    opened = {
        name: open_source(f"data.{name}", source, piece_bytes) for name, source in written.items()
    }
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
    sources = tuple((opened[name], configs[name]) for name in configs)
    with _parts_folder(target, sources, tell) as (folder, kept):
        if kept and sound_at(target) is not None:  # made while this process waited for the lock
            return open_prepared(target)
        work = Work(sources, data, encoder, folder, kept)
        check_room(work)
        reports, rated = _made(work, list(configs), workers or LocalProcesses(), tell)
        keep_folder(
            target,
            lambda building: assemble(building, work, reports, rated, seed, tell),
            lambda: sound_at(target) is not None,
        )
    return open_prepared(target)


@contextmanager
def _parts_folder(
    target: Path, sources: Sequence[tuple[Source, SourceConfig]], tell: Tell
) -> Iterator[tuple[Path, bool]]:
    """(a folder for parts, whether they are kept for a process that is killed). Where there is one
    part of each source, it is made again as fast as it is read.

    Raises:
        StorageError: it cannot be written.
    """
    many = any(len(opened.pieces) > 1 for opened, _ in sources)
    cuts = json.dumps([[piece.stop for piece in opened.pieces] for opened, _ in sources])
    digest = hashlib.sha256(cuts.encode()).hexdigest()[:16]
    folder = target.with_name(f".parts-{target.name[:16]}-{digest}")
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not many:
                made = tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-")
                yield Path(stack.enter_context(made)), False
                return
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_hold(target, error) from error
        lock = folder.with_suffix(".lock")
        rule = "is being filled with the same tokens by another process"
        stack.enter_context(locked(lock, rule, WAIT, Wait(math.inf, tell)))
        folder.mkdir(exist_ok=True)
        try:
            yield folder, True
        except (InputError, OSError):  # with another input they are other parts
            _remove(folder, lock)
            raise
        _remove(folder, lock)


def _remove(folder: Path, lock: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)


def _made(
    work: Work, names: Sequence[str], workers: Workers, tell: Tell
) -> tuple[dict[str, SourceReport], set[str]]:
    """Make the parts that are not there: (the report of each source, those with rated answers).
    The first part that fails, in the order of the rows, is the one whose error is raised.
    """
    pieces = work.pieces
    missing = [number for number in range(len(pieces)) if not work.is_made(number)]
    if len(missing) < len(pieces):
        tell(f"data: {len(pieces) - len(missing)} of {len(pieces)} parts of an earlier process")
    results: dict[int, Exception | None] = dict.fromkeys(set(range(len(pieces))) - set(missing))
    reports, rated = dict[str, SourceReport](), set[str]()
    ready = 0
    with closing(workers(work, missing, tell)) as made:
        for name, (opened, source) in zip(names, work.sources, strict=True):
            tally, told = Tally(), 0
            for _ in opened.pieces:
                while ready not in results:
                    number, error = next(made)
                    results[number] = error
                if (failed := results[ready]) is not None:
                    raise failed
                tally.add(work.tally(ready))
                ready += 1
                if tally.rows // PROGRESS_ROWS > told // PROGRESS_ROWS:
                    told = tally.rows
                    tell(f"{opened.label}: {tally.rows:,} rows")
            reports[name] = reported(opened, source, work.data, work.encoder, tally)
            tell(f"{opened.label}: {summary(reports[name])}")
            if tally.rated:
                rated.add(name)
    return reports, rated


def check_room(work: Work) -> None:
    """Refuse a disk that is too small, from the tokens of the first rows of each source.

    Raises:
        StorageError: the parts and the splits, which are there at the same time, do not fit.
    """
    needed = 0.0
    for opened, source in work.sources:
        if opened.bytes > ROOM_CHECKED:
            needed += 2 * opened.bytes * bytes_per_byte(opened, source, work.data, work.encoder)
    free = shutil.disk_usage(work.folder).free
    if needed > free:
        raise StorageError(
            str(work.folder.parent),
            f"has {size(free)} free, and the tokens and their parts need about {size(int(needed))}",
            "write a storage with more room",
        )


def assemble(
    folder: Path,
    work: Work,
    reports: dict[str, SourceReport],
    rated: set[str],
    seed: int,
    tell: Tell,
) -> None:
    """Write the splits and the report, from the parts of all sources."""
    data = work.data
    called = source_names(data)
    parts: dict[str, list[Part]] = {}
    rated_numbers = set[int]()
    for n, (name, (opened, _)) in enumerate(zip(reports, work.sources, strict=True)):
        written = opened.config
        number = called.index(written.called) if isinstance(written, NamedSource) else 0
        if name in rated and name.startswith("train"):
            rated_numbers.add(number)
        own = [work.part(part) for part, (owner, _) in enumerate(work.pieces) if owner == n]
        parts.setdefault(name.partition(".")[0], []).extend(
            replace(part, source=number) for part in own
        )
    read = {name: Examples(parts[name], work.folder) for name in SPLITS if name in parts}
    chosen = _chosen(read, data, seed, called, frozenset(rated_numbers))
    labels: tuple[str, ...] = ()
    if any(FORMATS[source.format].labels for _, source in work.sources):
        labels = label_names(data, (tuple(m["labels"]) for _, _, m in read["train"].more()))
    splits, row_files = dict[str, SplitReport](), dict[str, str]()
    columns = {name: _Columns.of(examples, data, labels) for name, examples in read.items()}
    for name, (examples, order) in chosen.items():
        own_columns, order = _columns_of(
            name, examples, order, columns[_read_split(name, read)], data, labels
        )
        chosen[name] = (examples, order)
        splits[name] = _write_split(folder, name, examples, order, own_columns, called)
        rows_n = taken(examples.rows, order, examples.empty)
        row_files[name] = write_rows(folder / rows_file(name), rows_n)
    opened_splits = {
        name: replace(TokenizedSplit.open(folder / f"{name}.arrow"), sources=called)
        for name in splits
    }
    for name, split in opened_splits.items():
        splits[name] = replace(splits[name], lengths=length_counts(split, data.max_length))
    if any(FORMATS[source.format].partners for _, source in work.sources):
        for name, split in opened_splits.items():
            path = folder / f"{partners_name(name)}.arrow"
            write_partners(path, split, seed, data.max_length, chosen[name][0].empty)
    pairs = {
        name: describe_pairs(split, *_answers(*chosen[name], folder))
        for name, split in opened_splits.items()
        if split.parts > 1
    }
    report = DataReport(
        sources=reports,
        splits=splits,
        pairs=pairs,
        duplicates=_shared(chosen, "print", folder) | _shared_in_train(chosen, called, folder),
        overlaps=_shared(chosen, "prompt", folder),
        notes=_notes(work.encoder, (source for _, source in work.sources), reports.values()),
        names=called,
        labels=labels,
        problem=data.problem if labels else None,
        row_files=row_files,
    )
    for name, found in report.pairs.items():
        tell(f"data.{name}: {found}")
    (folder / DATA_REPORT).write_text(report.to_json())


Chosen = dict[str, tuple[Examples, Indices]]
"""For each split: the examples that were read, and which of them it has, in its order."""


def _read_split(name: str, read: Mapping[str, Examples]) -> str:
    return name if name in read else "train"


def _chosen(
    read: Mapping[str, Examples],
    data: DataConfig,
    seed: int,
    called: tuple[str, ...],
    rated: frozenset[int],
) -> Chosen:
    drawn_from = "train" if isinstance(data.validation, float) else None
    found = {
        name: (examples, numbered(len(examples), examples.empty))
        for name, examples in read.items()
        if name != drawn_from
    }
    if isinstance(data.validation, float):
        train = read["train"]
        prompts = None
        if rated:
            keys = (keyed(raw, np.arange(at.start, at.stop)) for at, raw in train.hashes("prompt"))
            prompts = first_equal(keys, len(train), train.scratch, train.empty)
        drawn = Drawable(train.sources, train.rows, prompts, rated)
        kept, held = hold_out(drawn, data.validation, seed, called, train.empty)
        found["train"], found["validation"] = (train, kept), (train, held)
    return {name: found[name] for name in SPLITS if name in found}


@dataclass(frozen=True)
class _Columns:
    """What there is for all examples that were read, in their order.

    `targets` are [n, labels], and `unlabelled` those examples whose labels give none.
    """

    columns: dict[str, Column]
    difficulty: npt.NDArray[np.float64]
    targets: Column
    unlabelled: frozenset[int]

    @classmethod
    def of(cls, examples: Examples, data: DataConfig, labels: tuple[str, ...]) -> _Columns:
        columns, difficulty = columns_of(examples, {WEIGHT: 1.0})
        flat = examples.empty(len(examples) * len(labels), np.float32)
        targets = flat.reshape(len(examples), len(labels))
        rows = ((n, tuple(more["labels"])) for n, _, more in examples.more())
        wrong = fill_targets(targets, rows, data, labels) if labels else set[int]()
        return cls(columns, difficulty, targets, frozenset(wrong))


def _columns_of(
    name: str,
    examples: Examples,
    order: Indices,
    found: _Columns,
    data: DataConfig,
    labels: tuple[str, ...],
) -> tuple[dict[str, Column], Indices]:
    """The columns of a split, and which examples it has: of those that are measured on, only the
    answers and not their rationales.
    """
    columns = found.columns
    if not labels and name != "train" and RATIONALE in columns:
        order = order[columns[RATIONALE][order, 0] != 1.0]
    own = {column: taken(values, order, examples.empty) for column, values in columns.items()}
    if labels:
        wrong = [n for n in order.tolist() if n in found.unlabelled] if found.unlabelled else []
        if wrong:
            origin, more = next((at, more) for n, at, more in examples.more() if n == wrong[0])
            refuse_labels(name, origin, tuple(more["labels"]), data, labels)
        own[TARGET] = taken(found.targets, order, examples.empty)
        if name == "train":
            check_all_seen(own[TARGET], data, labels)
    written = getattr(data, name)
    if isinstance(data.train if isinstance(written, float) else written, list):
        own["source"] = taken(examples.sources, order, examples.empty, np.float32)[:, None]
    if name == "train" and difficulty_column(data) is not None:
        own["difficulty"] = taken(found.difficulty, order, examples.empty, np.float32)[:, None]
    return own, order


def _write_split(
    folder: Path,
    name: str,
    examples: Examples,
    order: Indices,
    columns: Mapping[str, Column],
    called: tuple[str, ...],
) -> SplitReport:
    label_tokens = 0

    def blocks() -> Iterator[tuple[TokenIds, Mask]]:
        nonlocal label_tokens
        for at in token_spans(offsets):
            ids, mask = examples.tokens_of(order[at])
            begins, ends = offsets[at], offsets[at.start + 1 : at.stop + 1]
            firsts = begins[begins < ends] - offsets[at.start]
            label_tokens += int(mask.sum()) - int(mask[firsts].sum())
            yield ids, mask

    offsets = summed(taken(examples.lengths, order, examples.empty), examples.empty)
    sha256 = write_split(folder / f"{name}.arrow", offsets, columns, blocks())
    return SplitReport(
        examples=len(order),
        tokens=int(offsets[-1]),
        label_tokens=label_tokens,
        sha256=sha256,
        sources=source_counts(columns["source"][:, 0], called) if "source" in columns else {},
    )


def _in_classes(
    members: Iterable[tuple[Examples, Indices, npt.NDArray[Any] | int]],
    column: str,
    classes: int,
    scratch: Path,
) -> Matches:
    """How the keys in `column` are shared between classes, where each of these examples is in the
    class of that number.
    """
    members = list(members)

    def blocks() -> Iterator[npt.NDArray[Any]]:
        for examples, order, of_class in members:
            class_n = examples.empty(len(examples), np.int32)
            for at in spans(len(order)):  # 0 is that of no class
                class_n[order[at]] = 1 + (of_class if isinstance(of_class, int) else of_class[at])
            for span, keys in examples.hashes(column):
                inside = class_n[span] > 0
                yield keyed(keys[inside], class_n[span][inside] - 1)

    total = sum(len(order) for _, order, _ in members)
    return count_matches(blocks(), total, classes, scratch)


def _shared(chosen: Chosen, column: str, scratch: Path) -> dict[str, int]:
    """For every pair "a/b" of splits, how many examples of b have the key of one of a."""
    members = [(examples, order, n) for n, (examples, order) in enumerate(chosen.values())]
    found = _in_classes(members, column, len(chosen), scratch)
    return _pairs(list(chosen), found)


def _shared_in_train(chosen: Chosen, called: tuple[str, ...], scratch: Path) -> dict[str, int]:
    """The same for every pair of sources of train that share any example."""
    examples, order = chosen["train"]
    if not called or not examples.sources.any():
        return {}
    members = [(examples, order, taken(examples.sources, order, examples.empty))]
    found = _in_classes(members, "print", len(called), scratch)
    pairs = _pairs([f"train.{name}" for name in called], found)
    return {pair: count for pair, count in pairs.items() if count}


def _pairs(names: Sequence[str], found: Matches) -> dict[str, int]:
    numbered = combinations(enumerate(names), 2)
    return {f"{a}/{b}": int(found.shared[i, j]) for (i, a), (j, b) in numbered}


def _answers(examples: Examples, order: Indices, scratch: Path) -> tuple[int, int]:
    """(different prompts, pairs whose answers stand in another pair the other way round)."""
    prompts = _in_classes([(examples, order, 0)], "prompt", 1, scratch)
    way_n = examples.empty(len(examples), np.uint8)
    for at, raw in examples.hashes("answers"):
        way_n[at] = raw[:, 16]
    turned = _in_classes([(examples, order, way_n[order])], "answers", 2, scratch)
    return int(prompts.distinct[0]), int(turned.shared[0, 1] + turned.shared[1, 0])


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
