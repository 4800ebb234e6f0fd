"""Where rows come from: files, saved data sets, the hub.

`open_source` checks everything that can be checked without reading the rows, so that a wrong
path or column is refused before anything is tokenised.
"""

from __future__ import annotations

import difflib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytune_ft.config.data import SourceConfig
from raytune_ft.config.paths import FILE_KINDS, is_hub_id
from raytune_ft.data.rows import (
    TEXT_COLUMN,
    BadRow,
    Row,
    Rows,
    read_csv,
    read_json,
    read_jsonl,
    read_tsv,
    read_txt,
    read_whole,
)
from raytune_ft.errors import DataError, first_line

if TYPE_CHECKING:
    import datasets

BATCH_ROWS = 1000


@dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        label: the config key, such as `data.train`, for messages.
        name: the file's name or the hub id; without directories, so that a report can be moved.
        sha256: of the file's bytes, or of the Arrow files behind a data set.
        columns: its columns, None if they are known only once the rows are read.
        read: (columns) -> rows with at least these columns, in order.
    """

    label: str
    name: str
    sha256: str
    columns: tuple[str, ...] | None
    read: Callable[[Sequence[str]], Rows]

    def rows(self, wanted: Mapping[str, str], optional: Sequence[str] = ()) -> Rows:
        """Every row; one that lacks a wanted column is a bad row.

        Args:
            wanted: key of the source (such as `prompt`), or a whole key (such as
                `data.curriculum.column`) -> column.
            optional: columns that rows may lack.

        Raises:
            DataError: there is no row at all, or a column that no row has.
        """
        if self.columns is not None:
            self._refuse_absent(wanted, self.columns)
        seen: dict[str, None] = {}
        empty = True
        known = self.columns
        columns = [*wanted.values(), *(one for one in optional if known is None or one in known)]
        for row in self.read(tuple(dict.fromkeys(columns))):
            empty = False
            if isinstance(row, BadRow):
                yield row
                continue
            seen.update(dict.fromkeys(row.values))
            missing = [column for column in wanted.values() if column not in row.values]
            if missing:
                yield BadRow(row.origin, "missing_column", f"no {missing[0]!r}")
            else:
                yield row
        if empty:
            remedy = "write a source that has at least one row"
            raise DataError(f"{self.label}.path={self.name}", "holds no rows", remedy)
        if seen:
            self._refuse_absent(wanted, tuple(seen))

    def _refuse_absent(self, wanted: Mapping[str, str], columns: Sequence[str]) -> None:
        for key, column in wanted.items():
            if column not in columns:
                where = key if "." in key else f"{self.label}.{key}"
                rule = f"is not a column of {self.name}, which has {_shown(columns)}"
                remedy = _nearest(column, columns, f"{where}=") or "write one of those"
                if self.name.lower().endswith((".csv", ".tsv")):
                    remedy += f" (a file without a header line needs {self.label}.columns)"
                raise DataError(f"{where}={column}", rule, remedy)


def open_source(label: str, source: SourceConfig) -> Source:
    """Find the source and read its columns, where they come before the rows.

    Raises:
        DataError: it does not exist, cannot be read, or is of an unknown kind.
    """
    path = Path(source.path).expanduser()
    try:
        if path.is_dir():
            return _open_saved(label, source, path)
        if path.is_file():
            return _open_file(label, source, path)
    except (OSError, pa.ArrowException) as error:
        rule = f"cannot be read ({first_line(error)})"
        raise _refusal(label, source, rule, "write a file that can be read") from error
    if is_hub_id(source.path):
        return _open_hub(label, source)
    remedy = "write a file, a folder saved by datasets, or a hub id such as owner/name"
    if path.parent.is_dir():
        siblings = [item.name for item in path.parent.iterdir()]
        remedy = _nearest(path.name, siblings, f"{label}.path={path.parent}/") or remedy
    raise _refusal(label, source, "does not exist", remedy)


TEXT_READERS: dict[str, Callable[[Path, SourceConfig], Rows]] = {
    ".jsonl": lambda path, _: read_jsonl(path),
    ".json": lambda path, _: read_json(path),
    ".csv": lambda path, source: read_csv(path, source.columns),
    ".tsv": lambda path, source: read_tsv(path, source.columns),
    ".txt": lambda path, source: read_whole(path) if source.rows == "file" else read_txt(path),
}


def _open_file(label: str, source: SourceConfig, path: Path) -> Source:
    kind = path.suffix.lower()
    if kind not in FILE_KINDS:
        known = ", ".join(FILE_KINDS)
        raise _refusal(label, source, f"is of an unknown kind {kind!r}", f"write one of {known}")
    _refuse_unused(label, source, kind, {".csv": {"columns"}, ".tsv": {"columns"}})
    sha256 = _sha256([path])
    if kind == ".parquet":
        file = pq.ParquetFile(path)
        return Source(
            label,
            path.name,
            sha256,
            tuple(file.schema_arrow.names),
            lambda columns: _guarded(
                label,
                source,
                _batch_rows(path.name, file.iter_batches(BATCH_ROWS, columns=list(columns))),
            ),
        )
    columns = (TEXT_COLUMN,) if kind == ".txt" else None
    reader = TEXT_READERS[kind]
    return Source(
        label,
        path.name,
        sha256,
        columns,
        lambda _: _guarded(label, source, reader(path, source)),
    )


def _open_saved(label: str, source: SourceConfig, path: Path) -> Source:
    import datasets

    _refuse_unused(label, source, "folder", {"folder": {"split"}})
    try:
        saved = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        rule = "is a folder that datasets' save_to_disk did not make"
        raise _refusal(label, source, rule, "write one, or a single file") from error
    return _of_data_set(label, source, path.name, saved)


def _open_hub(label: str, source: SourceConfig) -> Source:
    return _of_data_set(label, source, source.path, _load_hub(label, source))


def fetch_source(label: str, source: SourceConfig) -> tuple[str, int, bool] | None:
    """(folder, bytes, whether it is new) of a source of the hub; None for one of this machine.

    Raises:
        DataError: the hub does not provide it.
    """
    if Path(source.path).expanduser().exists() or not is_hub_id(source.path):
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

    _refuse_unused(label, source, "hub", {"hub": {"split", "subset"}})
    try:
        found = datasets.load_dataset(source.path, source.subset)
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
) -> Source:
    chosen = _pick_split(label, source, data)

    def read(columns: Sequence[str]) -> Rows:
        tables = chosen.select_columns(list(columns)).with_format("arrow").iter(BATCH_ROWS)
        return _guarded(label, source, _batch_rows(name, tables))

    files = [Path(file["filename"]) for file in chosen.cache_files]
    return Source(label, name, _sha256(files), tuple(chosen.column_names), read)


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
        rule = f"is not a split of {source.path}, which has {_shown(splits)}"
        raise DataError(value, rule, remedy or "write one of those")
    return data[source.split]


def _batch_rows(name: str, batches: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[Row]:
    number = 0
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


def _guarded(label: str, source: SourceConfig, rows: Iterable[Row | BadRow]) -> Rows:
    """Errors while rows are read name the source, like those on opening it."""
    try:
        yield from rows
    except (OSError, pa.ArrowException) as error:
        rule = f"could not be read to its end ({first_line(error)})"
        raise _refusal(label, source, rule, "write an intact copy of it") from error


def _sha256(files: Iterable[Path]) -> str:
    """Hash of one file, or of the hashes of several."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def _refuse_unused(
    label: str, source: SourceConfig, kind: str, used: Mapping[str, set[str]]
) -> None:
    """Refuses keys that have no effect: without its `split` a source would give the wrong rows."""
    for key in ("split", "subset", "columns"):
        if key not in used.get(kind, set()) and getattr(source, key) is not None:
            value = f"{label}.{key}={getattr(source, key)}"
            raise DataError(value, f"has no effect on {source.path}", "remove it")


def _refusal(label: str, source: SourceConfig, rule: str, remedy: str) -> DataError:
    return DataError(f"{label}.path={source.path}", rule, remedy)


def _nearest(name: str, names: Sequence[str], prefix: str) -> str | None:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else None


def _shown(names: Sequence[str], limit: int = 12) -> str:
    shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in names[:limit]]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
