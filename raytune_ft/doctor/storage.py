"""Checks of the storage of a config: files, objects, locks."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from raytune_ft.doctor import probes
from raytune_ft.doctor.findings import NO_ANSWER, Finding, Row, well
from raytune_ft.doctor.subject import ASK_S, Answers, Subject, answered, first_node, without_remedy
from raytune_ft.errors import RaytuneFtError, StorageError, first_line
from raytune_ft.rundir import remote_url

UNWRITABLE = Finding(
    "defect",
    "{folder} cannot be written: {reason}",
    "mount the shared file system there, writable for the user of Ray, under the same path",
)
UNSHARED = Finding(
    "defect",
    "does not see files of {writers} in {folder}",
    "storage must be one shared file system under the same path on every node, or s3://",
)
NO_BUCKET = Finding(
    "defect",
    "the object store fails: {reason}",
    "the bucket must exist, and the environment must have AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
    "and, outside of AWS, AWS_ENDPOINT_URL: see docs/checkpoints.md",
)


def storage(subject: Subject) -> list[Row]:
    assert subject.config is not None
    url = remote_url(subject.config)
    rows = [_bucket(url, first_node(subject))] if url else []
    folder, text = _probe_folder(subject), secrets.token_hex(16)
    if isinstance(folder, OSError):
        reason = folder.strerror
        return [*rows, UNWRITABLE.on(first_node(subject), folder=subject.storage, reason=reason)]
    names = {node: f"node-{number}" for number, node in enumerate(subject.site.nodes)}
    asked = {node: (str(folder), name, text) for node, name in names.items()}
    wrote = subject.site.ask(probes.write, asked, ASK_S)
    good = [name for node, name in names.items() if not isinstance(wrote[node], Exception)]
    unread = subject.site.ask(probes.unreadable, (str(folder), text, good), ASK_S)
    unread, lost = answered(unread)
    writers = {name: node for node, name in names.items()}
    unseen = {node: [writers[name] for name in missing] for node, missing in unread.items()}
    return [*rows, *judge_storage(subject.storage, wrote, unseen), *lost]


def judge_storage(
    folder: str, wrote: Answers, unseen: Mapping[str, Sequence[str]]
) -> Iterator[Row]:
    """`wrote`: None for each node that could write. `unseen`: the writers whose files a node does
    not see.
    """
    failed = {node: error for node, error in wrote.items() if isinstance(error, Exception)}
    for node, error in failed.items():
        if isinstance(error, OSError):
            reason = error.strerror or first_line(error)
            yield UNWRITABLE.on(node, folder=folder, reason=reason)
        else:
            yield NO_ANSWER.on(node, reason=first_line(error))
    blind = {node: missing for node, missing in unseen.items() if missing}
    for node, missing in blind.items():
        yield UNSHARED.on(node, writers=", ".join(missing), folder=folder)
    if not failed and not blind:
        yield well(f"{folder}: every node writes, and reads what the others wrote")


def _probe_folder(subject: Subject) -> Path | OSError:
    """A new folder in the storage, or above it where that does not exist yet."""
    parent = probes.existing(Path(subject.storage))
    folder = parent / f".raytune-ft-doctor-{secrets.token_hex(8)}"
    try:
        folder.mkdir()
    except OSError as error:
        return error
    subject.undo.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _bucket(url: str, node: str) -> Row:
    """Put, read and delete an object, as the process does that drives a run."""
    from raytune_ft.bucket import Bucket, Timing

    key, text = f".raytune-ft-doctor-{secrets.token_hex(8)}", secrets.token_bytes(16)
    try:
        bucket = Bucket(url, Timing(attempts=2, connect_s=5.0, read_s=5.0))
        bucket.put(key, text)
        same = bucket.get(key) == text
        bucket.delete(key)
    except RaytuneFtError as error:
        return NO_BUCKET.on(node, reason=without_remedy(error))
    if not same:
        return NO_BUCKET.on(node, reason=f"{bucket.url} returns something else than was written")
    return well(f"{bucket.url}: written, read and deleted", node)


NO_LOCKS = Finding(
    "defect",
    "a lock in {folder} does not work: it {reason}",
    "mount it with locks (Lustre: -o flock; NFS: without nolock and local_lock), or write another "
    "storage; two processes could drive one run otherwise",
)
LOCK_TAKEN = Finding(
    "defect",
    "gets a lock in {folder} that {holder} holds",
    "mount it with locks between nodes (Lustre: -o flock, not localflock; NFS: without nolock and "
    "local_lock), or write another storage",
)


def locks(subject: Subject) -> list[Row]:
    folder = _probe_folder(subject)
    if isinstance(folder, OSError):
        return [NO_ANSWER.on(first_node(subject), reason=f"{subject.storage} cannot be written")]
    path = str(folder / "lock")
    holder = first_node(subject)
    held = subject.site.ask(probes.hold_lock, {holder: (path,)}, ASK_S)
    others = {node: (path,) for node in subject.site.nodes if node != holder}
    took = subject.site.ask(probes.takes_lock, others, ASK_S) if others else {}
    return list(judge_locks(str(folder.parent), held, took))


def judge_locks(folder: str, held: Answers, took: Answers) -> Iterator[Row]:
    """`held`: None for the one node that holds the lock. `took`: whether each other one got it."""
    bad = False
    for node, answer in {**held, **took}.items():
        if isinstance(answer, StorageError):
            bad = True
            yield NO_LOCKS.on(node, folder=folder, reason=answer.rule)
        elif isinstance(answer, Exception):
            bad = True
            yield NO_ANSWER.on(node, reason=first_line(answer))
        elif answer:
            bad = True
            yield LOCK_TAKEN.on(node, folder=folder, holder=", ".join(held))
    if not bad:
        yield well(f"{folder}: a lock keeps every other process out")
