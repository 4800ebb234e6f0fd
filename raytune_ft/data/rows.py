"""Rows of the text formats: JSONL, JSON, CSV, TSV and plain text.

A row that cannot be used is not left out: it becomes a `BadRow` with its line and its cause.
Lines are parsed here and not by a data-frame library, because none of them names a bad line and
continues.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from raytune_ft.errors import DataError

TEXT_COLUMN = "text"
"""The column of a .txt file's lines."""

_UTF8_MARK = b"\xef\xbb\xbf"
_FOREIGN_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Row:
    """Column values of one row; `origin` is its place, such as `train.jsonl:12`."""

    origin: str
    values: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot become an example. `cause` is a key of the data report."""

    origin: str
    cause: str
    detail: str


Rows = Iterator[Row | BadRow]


@dataclass(frozen=True)
class TextFile:
    """The bytes of a text file, or of a range of its lines.

    Attributes:
        path: a file on this machine.
        name: how its rows name it.
        compression: what its bytes are compressed with: gzip, zstd or None.
        start, stop: the bytes of the first line and behind the last one; None is the end. Only
            of files that are not compressed.
        line: the number of the first line.
        written: the path or the URL that `path` is a copy of, for messages.
    """

    path: Path
    name: str
    written: str
    compression: str | None = None
    start: int = 0
    stop: int | None = None
    line: int = 1

    def open(self) -> BinaryIO:
        """At the first line."""
        if self.compression is None:
            file = self.path.open("rb")
            file.seek(self.start)
            return file
        stream = pa.CompressedInputStream(pa.OSFile(str(self.path)), self.compression)
        return io.BufferedReader(stream, 1 << 16)

    def lines(self) -> Iterator[bytes]:
        """With their ends."""
        with self.open() as file:
            if self.stop is None:
                yield from file
                return
            at = self.start
            for line in file:
                yield line
                at += len(line)
                if at >= self.stop:
                    return

    def whole(self) -> str:
        """As text; bytes that are not UTF-8 become lone surrogates."""
        with self.open() as file:
            return file.read().decode("utf-8-sig", errors="surrogateescape")


def valid_unicode(text: str) -> bool:
    """False if bytes were not UTF-8, or an escape such as \\ud800 is half a character."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def number_of(value: Any) -> float | None:
    """A finite number, which some formats hold as text; None where it is none, as true is."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def read_jsonl(file: TextFile) -> Rows:
    """One JSON object per line. Blank lines are `empty` rows, except for those at the end."""
    for number, line in _lines(file):
        origin = f"{file.name}:{number}"
        if isinstance(line, BadRow):
            yield line
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield BadRow(origin, "bad_json", str(error))
            continue
        yield _object(origin, value)


def read_json(file: TextFile) -> Rows:
    """A list of objects, or an object that holds such a list under `data`.

    Raises:
        DataError: the file is not JSON, or holds something else.
    """
    text = file.whole()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = "correct it; a file with one object a line is named .jsonl"
        raise DataError(file.written, f"is not a JSON document ({error})", remedy) from error
    if isinstance(content, dict):
        content = content.get("data")
    if not isinstance(content, list):
        remedy = 'write [{...}, ...] or {"data": [{...}, ...]}'
        raise DataError(file.written, "does not hold a list of objects", remedy)
    for number, value in enumerate(content, start=1):
        yield _object(f"{file.name}:row {number}", value)


def read_whole(file: TextFile) -> Rows:
    """One row: the whole file in the column `text`, with its line ends."""
    _refuse_foreign_encoding(file)
    text = file.whole()
    if text.strip():
        yield Row(file.name, {TEXT_COLUMN: text})


def read_txt(file: TextFile) -> Rows:
    """One row for each line that is not blank, in the column `text`."""
    for number, line in _lines(file):
        if isinstance(line, str):
            yield Row(f"{file.name}:{number}", {TEXT_COLUMN: line})
        elif line.cause != "empty":
            yield line


def read_tsv(file: TextFile, columns: Sequence[str] | None) -> Rows:
    """One row per line, fields between tabs, every other character literal.

    There is no quoting, as in the registered type text/tab-separated-values: a quote is a quote,
    and a field cannot hold a tab or a line end. Text that has them needs CSV or JSONL.
    """
    header = columns
    if header is None and file.start:
        first = next(replace(file, start=0, stop=None).lines()).removeprefix(_UTF8_MARK)
        header = _header(file, first.decode().rstrip("\r\n").split("\t"))
    for number, line in _lines(file):
        origin = f"{file.name}:{number}"
        if header is None:
            header = _header(file, line.split("\t") if isinstance(line, str) else None)
        elif isinstance(line, BadRow):
            yield line
        else:
            yield _record(origin, header, line.split("\t"))


def read_csv(file: TextFile, columns: Sequence[str] | None) -> Rows:
    """Comma-separated, quoted as RFC 4180 says: a quoted field may hold commas and line ends.

    Raises:
        DataError: a quote that is opened and not closed, after which no line can be trusted.
    """
    _refuse_foreign_encoding(file)
    csv.field_size_limit(2**31 - 1)
    header, line, blank = columns, 1, list[BadRow]()
    with io.TextIOWrapper(
        file.open(), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as text:
        records = csv.reader(text, strict=True)
        while True:
            origin = f"{file.name}:{line}"
            try:
                fields = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                if records.line_num != line:
                    remedy = 'close the quote, and write a quote inside a field as ""'
                    raise DataError(
                        f"{file.written}:{line}", f"is not CSV ({error})", remedy
                    ) from error
                yield BadRow(origin, "bad_csv", str(error))
                continue
            finally:
                line = records.line_num + 1
            if not fields:
                blank.append(BadRow(origin, "empty", "a blank line"))
                continue
            yield from blank
            blank.clear()
            if header is None:
                header = _header(file, fields if all(map(valid_unicode, fields)) else None)
            elif not all(map(valid_unicode, fields)):
                yield BadRow(origin, "bad_encoding", "bytes that are not UTF-8")
            else:
                yield _record(origin, header, fields)


def _lines(file: TextFile) -> Iterator[tuple[int, str | BadRow]]:
    """Numbered lines without their ends; blank lines and those that are not UTF-8 as `BadRow`.

    Blank lines at the end of the file are left out: editors end files with them.
    """
    _refuse_foreign_encoding(file)
    blank: list[tuple[int, BadRow]] = []
    for number, line in enumerate(file.lines(), start=file.line):
        if number == 1:
            line = line.removeprefix(_UTF8_MARK)
        origin = f"{file.name}:{number}"
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            bad = BadRow(origin, "bad_encoding", f"byte {error.start + 1} is not UTF-8")
            yield from blank
            blank.clear()
            yield number, bad
            continue
        if not text.strip():
            blank.append((number, BadRow(origin, "empty", "a blank line")))
            continue
        yield from blank
        blank.clear()
        yield number, text


def end_of_row(file: TextFile, near: int) -> int:
    """The byte behind the first line that begins behind `near` and is not blank: there a range may
    end. The end of the file where there is none.
    """
    with file.open() as opened:
        opened.seek(near)
        opened.readline()
        while line := opened.readline():
            if line.decode(errors="replace").strip():
                break
        return opened.tell()


def _refuse_foreign_encoding(file: TextFile) -> None:
    """UTF-16 must not be read as UTF-8 with every other character a NUL."""
    if file.start:
        return
    with file.open() as opened:
        if opened.read(2) in _FOREIGN_MARKS:
            raise DataError(file.written, "is UTF-16 or UTF-32", "save it as UTF-8")


def _header(file: TextFile, names: list[str] | None) -> list[str]:
    remedy = "correct the header line, or name the columns of a file without one in `columns`"
    if names is None:
        raise DataError(file.written, "begins with a line that is blank or not UTF-8", remedy)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(file.written, f"has two columns named {twice[0]!r}", remedy)
    return names


def _record(origin: str, header: Sequence[str], fields: list[str]) -> Row | BadRow:
    if len(fields) != len(header):
        detail = f"{len(fields)} fields where there are {len(header)} columns"
        return BadRow(origin, "wrong_columns", detail)
    return Row(origin, dict(zip(header, fields, strict=True)))


def _object(origin: str, value: Any) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(origin, value)
    return BadRow(origin, "wrong_type", f"{type(value).__name__} where an object is needed")
