"""The rows of a source, as one list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from raytune_ft.data.rows import BadRow, Row
from raytune_ft.data.sources import Source


def rows_of(source: Source, wanted: Mapping[str, str], scratch: Path) -> Iterator[Row | BadRow]:
    """Of all its pieces; then the columns are checked."""
    seen: dict[int, list[str]] = {}
    for piece in source.pieces:
        found = dict.fromkeys(seen.get(piece.shard, ()))
        yield from source.rows_of(piece, wanted, (), found, scratch)
        seen[piece.shard] = list(found)
    source.check_columns(wanted, seen)
