"""Write a model's weights in shards, one after another, so that a killed write can continue.

.journal.json                       the shards that have reached the disk, with their hashes
.model-00002-of-00003.safetensors   being written, or left by a process that died
model-00001-of-00003.safetensors    whole
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from raytune_ft.errors import MergeError, StorageError
from raytune_ft.files import fsync, read_json, sha256_of, write_json_atomic
from raytune_ft.layout import JOURNAL, shard_name
from raytune_ft.merge.streaming_forward import Weights, spans
from raytune_ft.model.export import write_index
from raytune_ft.records import FileRecord, Tell
from raytune_ft.tensors.write import Entry, write_tensors

MAX_SHARD_SIZE = "5GB"


def plan_hash(*facts: object) -> str:
    """A hash of what is written: only the same work continues an interrupted write."""
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def write_weights(
    weights: Weights,
    target: Path,
    plan: str,
    max_shard_bytes: int,
    dtypes: Mapping[str, torch.dtype],
    tell: Tell,
) -> list[FileRecord]:
    """Write the shards and, if there are several, their index; shards in the journal are kept.

    Floating-point tensors are cast once, to their entry of `dtypes`.

    Raises:
        MergeError: a value is not finite; names the tensor.
        StorageError: `target` holds weights that are not of this `plan`.
    """
    shards = _layout(weights, max_shard_bytes, dtypes)
    done = _resume(target, plan, [name for name, _ in shards], tell)
    for name, entries in shards:
        if name in done:
            continue
        temporary = f".{name}"
        record = write_tensors(target, temporary, entries, _cast(weights, entries))
        (target / temporary).replace(target / name)
        fsync(target)
        done[name] = FileRecord(name, record.bytes, record.sha256)
        _write_journal(target, plan, done.values())
    records = [done[name] for name, _ in shards]
    if len(shards) > 1:
        records.append(write_index(target, shards))
    return records


def forget_journal(target: Path) -> None:
    """Delete the journal, once there is a manifest."""
    (target / JOURNAL).unlink(missing_ok=True)
    fsync(target)


def _layout(
    weights: Weights, max_shard_bytes: int, dtypes: Mapping[str, torch.dtype]
) -> list[tuple[str, list[Entry]]]:
    """Files with their tensors, in order: as many per file as fit, and at least one."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for name, shape in weights.shapes.items():
        own = weights.dtype(name)
        entry = Entry(name, dtypes.get(name, own) if own.is_floating_point else own, shape)
        count = math.prod(shape) * entry.dtype.itemsize
        if groups[-1] and size + count > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += count
    return [(shard_name("model", n, len(groups)), group) for n, group in enumerate(groups)]


@torch.no_grad()
def _cast(weights: Weights, entries: Iterable[Entry]) -> Iterator[Tensor]:
    for entry in entries:
        for start, end in spans(entry.shape):
            rows = weights.rows(entry.name, start, end).to(entry.dtype)
            if entry.dtype.is_floating_point and not torch.isfinite(rows).all():
                raise MergeError(
                    f"{entry.name} is not finite (NaN or infinity) in {entry.dtype}; "
                    "these weights cannot be used"
                )
            yield rows


def _resume(target: Path, plan: str, names: list[str], tell: Tell) -> dict[str, FileRecord]:
    """Shards of an earlier attempt at the same work that still have their hashes."""
    target.mkdir(parents=True, exist_ok=True)
    for rubbish in target.glob(".model*.safetensors"):
        rubbish.unlink()
    try:
        journal = read_json(target / JOURNAL)
    except FileNotFoundError:
        journal = None
    held = sorted(path.name for path in target.glob("*.safetensors"))
    if journal is None and not held:
        _write_journal(target, plan, [])
        return {}
    if journal is None or journal["plan"] != plan:
        raise StorageError(
            str(target),
            f"holds {held[0] if held else 'a beginning'} of other work, and nothing is overwritten",
            "write another directory, or delete this one",
        )
    records = [FileRecord(**record) for record in journal["shards"]]
    sound = {
        record.path: record
        for record in records
        if record.path in names
        and (target / record.path).is_file()
        and (target / record.path).stat().st_size == record.bytes
        and sha256_of(target / record.path) == record.sha256
    }
    for name in held:
        if name not in sound:
            (target / name).unlink()
    if sound:
        tell(f"{len(sound)} of {len(names)} shards are already written")
    return sound


def _write_journal(target: Path, plan: str, records: Iterable[FileRecord]) -> None:
    write_json_atomic(target / JOURNAL, {"plan": plan, "shards": [asdict(r) for r in records]})
