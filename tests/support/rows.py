"""The rows of a source, as one list, and the examples of a split, as hashes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from raytune_ft.data.parts import fingerprint
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.data.sources import Source
from raytune_ft.data.split import TokenizedSplit


def rows_of(source: Source, wanted: Mapping[str, str], scratch: Path) -> Iterator[Row | BadRow]:
    """Of all its pieces; then the columns are checked."""
    seen: dict[int, list[str]] = {}
    for piece in source.pieces:
        found = dict.fromkeys(seen.get(piece.shard, ()))
        yield from source.rows_of(piece, wanted, (), found, scratch)
        seen[piece.shard] = list(found)
    source.check_columns(wanted, seen)


def fingerprints(split: TokenizedSplit) -> list[bytes]:
    """One for each example, as parts have it."""
    return [fingerprint(*split.example(i)) for i in range(len(split))]
