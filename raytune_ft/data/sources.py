"""Where rows come from: files, folders and globs of them, buckets, saved data sets, the hub.

`open_source` checks everything that can be checked without reading the rows, so that a wrong
path or column is refused before anything is tokenised. It cuts the rows into pieces, which are read
apart from each other; the rows of all pieces, one after another, do not depend on the cuts.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytune_ft.config.data import SourceConfig
from raytune_ft.config.paths import FILE_KINDS, file_kind, is_glob, is_hub_id, is_url
from raytune_ft.data.rows import (
    TEXT_COLUMN,
    BadRow,
    Row,
    Rows,
    TextFile,
    end_of_row,
    read_csv,
    read_json,
    read_jsonl,
    read_tsv,
    read_txt,
    read_whole,
)
from raytune_ft.data.stores import Remote, copy_to, files_at
from raytune_ft.errors import DataError, first_line
from raytune_ft.format import some_of

if TYPE_CHECKING:
    import datasets

BATCH_ROWS = 1000
PIECE_BYTES = (2**19, 64 * 2**20)
"""The least and the most bytes of a piece, where `open_source` is not told them."""
PIECES = 64
"""About how many there are between these limits."""
COMPRESSED = 4
"""How many bytes of text a compressed byte is taken for."""
BLOCK = 2**20


@dataclass(frozen=True)
class Shard:
    """A file of a source.

    Attributes:
        name: how its rows name it, without the directories that all shards share.
        path: on this machine, or a URL.
        size: in bytes.
        stamp: another one once its content has changed.
    """

    name: str
    path: str
    size: int
    stamp: str

    @property
    def kind(self) -> str:
        """The extension without that of a compression."""
        return file_kind(self.path)[0]

    @property
    def text_bytes(self) -> int:
        """About the size of its text."""
        return self.size * (1 if file_kind(self.path)[1] is None else COMPRESSED)


@dataclass(frozen=True)
class Piece:
    """Rows of a source that are read together.

    Attributes:
        shard: the number of the file, 0 for a data set.
        start, stop: of a text its bytes, of a Parquet file its row groups, of a data set its rows;
            None is the end.
        line: the number of the first line or row.
        bytes: about those of its text.
    """

    shard: int
    start: int = 0
    stop: int | None = None
    line: int = 1
    bytes: int = 0


@dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        label: the config key, such as `data.train`, for messages.
        config: the section of that key.
        name: that of the file, the glob or the folder, or the hub id; without directories, so that
            a report can be moved.
        sha256: of the file's bytes or of the hashes of several; of files in a store, of their
            names, sizes and ETags.
        columns: its columns, None if they are known only once the rows are read.
        shards: its files; none of a data set.
        pieces: all its rows, in order.
        table: the data set.
    """

    label: str
    config: SourceConfig
    name: str
    sha256: str
    columns: tuple[str, ...] | None
    pieces: tuple[Piece, ...]
    shards: tuple[Shard, ...] = ()
    table: datasets.Dataset | None = field(default=None, repr=False)

    @property
    def bytes(self) -> int:
        """About those of the text of all rows."""
        return sum(piece.bytes for piece in self.pieces)

    def all_rows(self) -> Generator[Row | BadRow, None, None]:
        """Every row as it is, with all columns."""
        with tempfile.TemporaryDirectory() as scratch:
            for piece in self.pieces:
                yield from self.read(piece, self.columns or (), Path(scratch))

    def rows_of(
        self,
        piece: Piece,
        wanted: Mapping[str, str],
        optional: Sequence[str],
        seen: dict[str, None],
        scratch: Path,
    ) -> Rows:
        """The rows of a piece; one that lacks a wanted column is a bad row.

        Args:
            wanted: key of the source (such as `prompt`), or a whole key (such as
                `data.curriculum.column`) -> column.
            optional: columns that rows may lack.
            seen: gets the columns that a row has, and "" for any row.
        """
        if self.columns is not None:
            self._refuse_absent(wanted, self.columns)
        known = self.columns
        columns = [*wanted.values(), *(one for one in optional if known is None or one in known)]
        for row in self.read(piece, tuple(dict.fromkeys(columns)), scratch):
            seen[""] = None
            if isinstance(row, BadRow):
                yield row
                continue
            seen.update(dict.fromkeys(row.values))
            missing = [column for column in wanted.values() if column not in row.values]
            if missing:
                yield BadRow(row.origin, "missing_column", f"no {missing[0]!r}")
            else:
                yield row

    def check_columns(self, wanted: Mapping[str, str], seen: Mapping[int, Sequence[str]]) -> None:
        """Refuses a source without rows, or without a wanted column, or with a shard that lacks
        one that others have; `seen` is what `rows_of` saw in each shard.
        """
        if not any(seen.values()):
            remedy = "write a source that has at least one row"
            raise DataError(f"{self.label}.path={self.name}", "holds no rows", remedy)
        columns = {shard: [one for one in found if one] for shard, found in seen.items()}
        every = tuple(dict.fromkeys(one for found in columns.values() for one in found))
        if every:
            self._refuse_absent(wanted, every)
        for shard, found in columns.items():
            for column in wanted.values():
                if found and column not in found:
                    raise self._different(self.shards[shard], column)

    def read(self, piece: Piece, columns: Sequence[str], scratch: Path) -> Rows:
        """The rows of a piece, with at least these columns. A file in a store is copied into
        `scratch` for as long.
        """
        if self.table is not None:
            part = self.table.select(range(piece.start, piece.stop or len(self.table)))
            tables = part.select_columns(list(columns)).with_format("arrow").iter(BATCH_ROWS)
            yield from self._guarded(None, _batch_rows(self.name, tables, piece.line))
            return
        shard = self.shards[piece.shard]
        if not is_url(shard.path):
            yield from self._guarded(
                shard, self._read_file(shard, Path(shard.path), piece, columns)
            )
            return
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".copy-") as folder:
            path = Path(folder) / PurePath(shard.path).name
            try:
                copy_to(Remote(shard.path, shard.size, shard.stamp), path)
            except DataError as error:
                raise _of_store(self.label, error) from None
            yield from self._guarded(shard, self._read_file(shard, path, piece, columns))

    def _read_file(self, shard: Shard, path: Path, piece: Piece, columns: Sequence[str]) -> Rows:
        kind, compression = file_kind(shard.path)
        if kind != ".parquet":
            place = (piece.start, piece.stop, piece.line)
            file = TextFile(path, shard.name, shard.path, compression, *place)
            return TEXT_READERS[kind](file, self.config)
        parquet = pq.ParquetFile(path)
        groups = range(piece.start, piece.stop or parquet.num_row_groups)
        names = list(columns) if self.columns is not None else parquet.schema_arrow.names
        batches = parquet.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=names)
        return _batch_rows(shard.name, batches, piece.line)

    def _guarded(self, shard: Shard | None, rows: Iterable[Row | BadRow]) -> Rows:
        """Errors while rows are read name the file, like those on opening it."""
        try:
            yield from rows
        except (OSError, pa.ArrowException) as error:
            _refuse_changed(self.label, shard)
            rule = f"could not be read to its end ({first_line(error)})"
            value = f"{self.label}.path={self.config.shown if shard is None else shard.path}"
            raise DataError(value, rule, "write an intact copy of it") from error
        _refuse_changed(self.label, shard)

    def _refuse_absent(self, wanted: Mapping[str, str], columns: Sequence[str]) -> None:
        for key, column in wanted.items():
            if column not in columns:
                where = key if "." in key else f"{self.label}.{key}"
                rule = f"is not a column of {self.name}, which has {_shown(columns)}"
                remedy = _nearest(column, columns, f"{where}=") or "write one of those"
                if any(shard.kind in (".csv", ".tsv") for shard in self.shards):
                    remedy += f" (a file without a header line needs {self.label}.columns)"
                raise DataError(f"{where}={column}", rule, remedy)

    def _different(self, shard: Shard, column: str) -> DataError:
        return _different(self.label, self.config, shard, column, "others have")


def open_source(label: str, source: SourceConfig, piece_bytes: int | None = None) -> Source:
    """Find the files of a source and read their columns, where those come before the rows.

    Args:
        piece_bytes: the most text of a piece; None chooses it by the size of the source.

    Raises:
        DataError: it does not exist, cannot be read, or is of an unknown kind.
    """
    if len(source.paths) == 1 and not is_url(source.paths[0]):
        path = Path(source.paths[0]).expanduser()
        if path.is_dir() and any((path / name).is_file() for name in SAVED):
            return _open_saved(label, source, path, piece_bytes)
        if not path.exists() and is_hub_id(source.paths[0]):
            return _of_data_set(label, source, source.shown, _load_hub(label, source), piece_bytes)
    try:
        shards = _named([_files(label, source, written) for written in source.paths])
        return _of_files(label, source, shards, piece_bytes)
    except (OSError, pa.ArrowException) as error:
        rule = f"cannot be read ({first_line(error)})"
        raise _refusal(label, source, rule, "write a file that can be read") from error


TEXT_READERS: dict[str, Callable[[TextFile, SourceConfig], Rows]] = {
    ".jsonl": lambda file, _: read_jsonl(file),
    ".json": lambda file, _: read_json(file),
    ".csv": lambda file, source: read_csv(file, source.columns),
    ".tsv": lambda file, source: read_tsv(file, source.columns),
    ".txt": lambda file, source: read_whole(file) if source.rows == "file" else read_txt(file),
}
SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
"""One of these is in a folder that `save_to_disk` made."""


def _files(label: str, source: SourceConfig, written: str) -> tuple[str, list[Shard]]:
    """(the directory that they share, the files that one path stands for), in order."""
    if is_url(written):
        try:
            found = files_at(written)
        except DataError as error:
            raise _of_store(label, error) from None
        shards = [Shard("", one.url, one.size, one.stamp) for one in found]
        if not shards:
            rule = "matches no file" if is_glob(written) else "does not exist"
            raise DataError(f"{label}.path={written}", rule, "write the URL of files that exist")
        root = written.rpartition("/")[0] if shards[0].path == written else _fixed(written)
        return root, shards
    path = Path(written).expanduser()
    if path.is_dir():
        inside = [file for file in sorted(path.rglob("*")) if not _is_hidden(file, path)]
        files = [file for file in inside if file_kind(file.name)[0] in FILE_KINDS]
        if not files:
            rule = "is a folder that datasets' save_to_disk did not make, and holds no data file"
            raise DataError(
                f"{label}.path={written}", rule, f"write one with files {', '.join(FILE_KINDS)}"
            )
        kinds = Counter(file_kind(file.name)[0] for file in files)
        if len(kinds) > 1:
            raise DataError(
                f"{label}.path={written}",
                f"is a folder of several kinds of files ({_shown(sorted(kinds))})",
                f"write a glob such as {written.rstrip('/')}/*{min(kinds)}",
            )
        return str(path), [_local(file) for file in files]
    if path.is_file():
        return str(path.parent), [_local(path)]
    if is_glob(written):
        matched = sorted(Path(one) for one in glob.glob(str(path), recursive=True))
        files = [file for file in matched if file.is_file()]
        if not files:
            raise DataError(
                f"{label}.path={written}", "matches no file", "write a glob of files that exist"
            )
        return _fixed(str(path)), [_local(file) for file in files]
    remedy = "write a file, a folder saved by datasets, or a hub id such as owner/name"
    if path.parent.is_dir():
        siblings = [item.name for item in path.parent.iterdir()]
        remedy = _nearest(path.name, siblings, f"{label}.path={path.parent}/") or remedy
    raise DataError(f"{label}.path={written}", "does not exist", remedy)


def local_bytes(source: SourceConfig) -> int:
    """About how much text files on this machine have; 0 of what is elsewhere or cannot be found."""
    size = 0
    for written in source.paths:
        with suppress(DataError, OSError):
            shards = [] if is_url(written) else _files("", source, written)[1]
            size += sum(shard.text_bytes for shard in shards)
    return size


def _fixed(written: str) -> str:
    """The directories of a glob or a folder before the first one that is not fixed."""
    if not is_glob(written):
        return written.rstrip("/")
    parts = written.split("/")
    return "/".join(parts[: next(i for i, part in enumerate(parts) if is_glob(part))])


def _is_hidden(file: Path, root: Path) -> bool:
    inner = file.relative_to(root).parts
    return not file.is_file() or any(part.startswith((".", "_")) for part in inner)


def _local(path: Path) -> Shard:
    facts = path.stat()
    return Shard("", str(path), facts.st_size, str(facts.st_mtime_ns))


def _named(found: Sequence[tuple[str, list[Shard]]]) -> list[Shard]:
    """The shards of all paths, by names of their own."""
    named = [
        Shard(one.path.removeprefix(root).lstrip("/"), one.path, one.size, one.stamp)
        for root, shards in found
        for one in shards
    ]
    if len({one.name for one in named}) == len(named):
        return named
    return [Shard(one.path, one.path, one.size, one.stamp) for one in named]


def _of_files(
    label: str, source: SourceConfig, shards: list[Shard], piece_bytes: int | None
) -> Source:
    for shard in shards:
        kind, compression = file_kind(shard.path)
        if kind not in FILE_KINDS or (kind == ".parquet" and compression):
            known = ", ".join(FILE_KINDS)
            found = PurePath(shard.path).suffix.lower() if compression else kind
            rule = f"is of an unknown kind {found!r}"
            raise DataError(f"{label}.path={shard.path}", rule, f"write one of {known}")
        _refuse_unused(label, source, kind, {".csv": {"columns"}, ".tsv": {"columns"}})
    twice = [path for path, n in Counter(shard.path for shard in shards).items() if n > 1]
    if twice:
        raise _refusal(label, source, f"lists {twice[0]} twice", "list every file once")
    if len({shard.kind for shard in shards}) > 1:
        kinds = _shown(sorted({shard.kind for shard in shards}))
        rule = f"has files of several kinds ({kinds})"
        raise _refusal(label, source, rule, "write a source for each kind")
    columns = _columns(label, source, shards)
    limit = piece_bytes or _piece_bytes(sum(shard.size for shard in shards))
    digests, pieces = list[bytes](), list[Piece]()
    for number, shard in enumerate(shards):
        digest, own = _scanned(source, number, shard, limit)
        digests.append(digest)
        pieces += own
        _refuse_changed(label, shard)
    names = [PurePath(path).name for path in source.paths]
    called = some_of(names, 1)
    return Source(label, source, called, _joined(digests), columns, tuple(pieces), tuple(shards))


def _piece_bytes(size: int) -> int:
    least, most = PIECE_BYTES
    return min(max(size // PIECES, least), most)


def _columns(label: str, source: SourceConfig, shards: list[Shard]) -> tuple[str, ...] | None:
    """Those that come before the rows, the same in every shard."""
    kind = shards[0].kind
    if kind == ".txt":
        return (TEXT_COLUMN,)
    if any(is_url(shard.path) for shard in shards):
        return None
    if kind == ".parquet":
        found = [tuple(pq.read_schema(shard.path).names) for shard in shards]
    elif kind in (".csv", ".tsv") and source.columns is None and len(shards) > 1:
        found = [_header_of(source, shard) for shard in shards]
    else:
        return None
    for shard, names in zip(shards, found, strict=True):
        lacking = [name for name in found[0] if name not in names]
        lacking += [name for name in names if name not in found[0]]
        if lacking:
            has, has_not = (shard, shards[0]) if lacking[0] in names else (shards[0], shard)
            raise _different(label, source, has_not, lacking[0], f"{has.name} has")
    return found[0] if kind == ".parquet" else None


def _different(
    label: str, source: SourceConfig, shard: Shard, column: str, whose: str
) -> DataError:
    rule = f"has shards with different columns: {shard.name} has no {column!r}, which {whose}"
    return _refusal(label, source, rule, "write shards of one kind, or several sources")


def _header_of(source: SourceConfig, shard: Shard) -> tuple[str, ...]:
    """The columns of a .csv or .tsv file: those of its first row that has any."""
    file = TextFile(Path(shard.path), shard.name, shard.path, file_kind(shard.path)[1])
    rows = TEXT_READERS[shard.kind](file, source)
    return next((tuple(row.values) for row in rows if isinstance(row, Row)), ())


def _scanned(
    source: SourceConfig, number: int, shard: Shard, limit: int
) -> tuple[bytes, list[Piece]]:
    """The hash of a shard, and its pieces. Only a text of lines that lies here can be cut: other
    texts are read from their beginning.
    """
    kind, compression = file_kind(shard.path)
    if is_url(shard.path):
        facts = "\0".join((shard.name, str(shard.size), shard.stamp))
        return hashlib.sha256(facts.encode()).digest(), [Piece(number, bytes=shard.text_bytes)]
    lines = kind in (".jsonl", ".tsv") or (kind == ".txt" and source.rows == "lines")
    if lines and compression is None:
        return _cut(number, shard, limit)
    digest = _digest(Path(shard.path))
    if kind != ".parquet":
        return digest, [Piece(number, bytes=shard.text_bytes)]
    facts = pq.ParquetFile(shard.path).metadata
    pieces, start, line, held, rows = list[Piece](), 0, 1, 0, 0
    for group in range(facts.num_row_groups):
        held += facts.row_group(group).total_byte_size
        rows += facts.row_group(group).num_rows
        if held >= limit or group == facts.num_row_groups - 1:
            pieces.append(Piece(number, start, group + 1, line, held))
            start, line, held, rows = group + 1, line + rows, 0, 0
    return digest, pieces or [Piece(number)]


def _cut(number: int, shard: Shard, limit: int) -> tuple[bytes, list[Piece]]:
    """The hash of a text of lines, and pieces that end with a line that is not blank."""
    text = TextFile(Path(shard.path), shard.name, shard.path)
    digest, pieces = hashlib.sha256(), list[Piece]()
    at, lines, start, line, stop = 0, 0, 0, 1, 0
    with Path(shard.path).open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            end = at + len(block)
            while True:
                if stop <= start and start + limit < min(end, shard.size):
                    stop = end_of_row(text, start + limit)
                if not start < stop <= end or stop >= shard.size:
                    break
                lines_there = lines + block[: stop - at].count(b"\n")
                pieces.append(Piece(number, start, stop, line, stop - start))
                start, line = stop, lines_there + 1
            at, lines = end, lines + block.count(b"\n")
    pieces.append(Piece(number, start, None, line, at - start))
    return digest.digest(), pieces


def _refuse_changed(label: str, shard: Shard | None) -> None:
    """DataError where a file is another one than when it was found."""
    if shard is None or is_url(shard.path):
        return
    try:
        now = _local(Path(shard.path))
    except OSError:
        now = None
    if now is None or (now.size, now.stamp) != (shard.size, shard.stamp):
        raise DataError(
            f"{label}.path={shard.path}",
            "changed while it was read",
            "let what writes it end, then start again",
        )


def _of_store(label: str, error: DataError) -> DataError:
    return DataError(f"{label}.path={error.value}", error.rule, error.remedy)


def _open_saved(label: str, source: SourceConfig, path: Path, piece_bytes: int | None) -> Source:
    import datasets

    _refuse_unused(label, source, "folder", {"folder": {"split"}})
    try:
        saved = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        rule = f"is a folder that datasets' save_to_disk did not make ({first_line(error)})"
        raise _refusal(label, source, rule, "write one, or a single file") from error
    return _of_data_set(label, source, path.name, saved, piece_bytes)


def fetch_source(label: str, source: SourceConfig) -> tuple[str, int, bool] | None:
    """(folder, bytes, whether it is new) of a source of the hub; None for one of this machine.

    Raises:
        DataError: the hub does not provide it.
    """
    (written, *more) = source.paths
    if more or Path(written).expanduser().exists() or not is_hub_id(written):
        return None
    begun = time.time()
    files = [
        Path(file["filename"])
        for split in _load_hub(label, source).values()
        for file in split.cache_files
    ]
    new = any(file.stat().st_mtime >= begun for file in files)
    return str(files[0].parent), sum(file.stat().st_size for file in files), new


def _load_hub(label: str, source: SourceConfig) -> datasets.DatasetDict:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    _refuse_unused(label, source, "hub", {"hub": {"split", "subset", "revision"}})
    pinned = {} if source.revision is None else {"revision": source.revision}
    try:
        found = datasets.load_dataset(source.paths[0], source.subset, **pinned)
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        rule = f"is not a local path, and the hub does not provide it ({first_line(error)})"
        remedy = (
            "correct it or, without a network, download the data set elsewhere and write its "
            "local path"
        )
        raise _refusal(label, source, rule, remedy) from error
    assert isinstance(found, datasets.DatasetDict)
    return found


def _of_data_set(
    label: str,
    source: SourceConfig,
    name: str,
    data: datasets.Dataset | datasets.DatasetDict,
    piece_bytes: int | None,
) -> Source:
    chosen = _pick_split(label, source, data)
    files = [Path(file["filename"]) for file in chosen.cache_files]
    size = max(int(chosen.data.nbytes), 1)
    rows = max(1, (piece_bytes or _piece_bytes(size)) * len(chosen) // size)
    pieces = [
        Piece(0, start, min(start + rows, len(chosen)), start + 1, size * rows // len(chosen))
        for start in range(0, len(chosen), rows)
    ]
    columns = tuple(chosen.column_names)
    return Source(
        label,
        source,
        name,
        _joined([_digest(file) for file in files]),
        columns,
        tuple(pieces) or (Piece(0),),
        table=chosen,
    )


def _pick_split(
    label: str, source: SourceConfig, data: datasets.Dataset | datasets.DatasetDict
) -> datasets.Dataset:
    splits = list(data) if isinstance(data, dict) else None
    value = f"{label}.split={source.split}"
    if splits is None:
        if source.split is not None:
            raise DataError(value, "is set for data without splits", f"drop {label}.split")
        return data
    if source.split is None and len(splits) == 1:
        return data[splits[0]]
    if source.split not in splits:
        remedy = _nearest(str(source.split), splits, f"{label}.split=")
        rule = f"is not a split of {source.shown}, which has {_shown(splits)}"
        raise DataError(value, rule, remedy or "write one of those")
    return data[source.split]


def _batch_rows(
    name: str, batches: Iterable[pa.RecordBatch | pa.Table], first: int
) -> Iterator[Row]:
    number = first - 1
    for batch in batches:
        columns = [_values(column) for column in batch.columns]
        for values in zip(*columns, strict=True):
            number += 1
            row = dict(zip(batch.schema.names, values, strict=True))
            yield Row(f"{name}:row {number}", row)


def _values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Python values; text that is not UTF-8 becomes a lone surrogate, as in the text formats."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return "\udcff"


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _joined(digests: Sequence[bytes]) -> str:
    """The hash of one file, or of the hashes of several."""
    if len(digests) == 1:
        return digests[0].hex()
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _refuse_unused(
    label: str, source: SourceConfig, kind: str, used: Mapping[str, set[str]]
) -> None:
    """Refuses keys that have no effect: without its `split` a source would give the wrong rows."""
    for key in ("split", "subset", "revision", "columns"):
        if key not in used.get(kind, set()) and getattr(source, key) is not None:
            value = f"{label}.{key}={getattr(source, key)}"
            raise DataError(value, f"has no effect on {source.shown}", "remove it")


def _refusal(label: str, source: SourceConfig, rule: str, remedy: str) -> DataError:
    return DataError(f"{label}.path={source.shown}", rule, remedy)


def _nearest(name: str, names: Sequence[str], prefix: str) -> str | None:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else None


def _shown(names: Sequence[str]) -> str:
    return some_of([name if len(name) <= 40 else f"{name[:37]}..." for name in names], 12)
