"""Every check: what it asks the nodes, and how it judges their answers.

A check is a function from a `Subject` to rows, and an entry of `CHECKS`. The judgement is a
function of its own, from plain answers to rows, so that it is tested without a cluster.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from packaging.requirements import Requirement

from raytune_ft.config.environment import names_in
from raytune_ft.config.load import to_plain
from raytune_ft.config.schema import Config
from raytune_ft.doctor import probes
from raytune_ft.doctor.findings import ALL, NO_ANSWER, Finding, Row, well
from raytune_ft.errors import (
    ClusterError,
    InputError,
    RaytuneFtError,
    StorageError,
    Unreachable,
    first_line,
)
from raytune_ft.format import seconds, size
from raytune_ft.rundir import remote_url, run_path

GIB = 2**30
ASK_S = 30.0
IMPORT_S = 240.0
"""For answers that import torch on a cold disk."""
Answers = Mapping[str, Any]


class Site(Protocol):
    """The nodes that are examined, by name; see `NodeProcesses`."""

    nodes: dict[str, Any]
    lost: dict[str, Exception]

    def ask(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any] | Mapping[str, Sequence[Any]],
        limit_s: float,
    ) -> dict[str, Any]: ...

    def gcs_addresses(self) -> list[str]: ...

    def end(self) -> None: ...


@dataclass
class Subject:
    """What is examined. `undo` removes probe files, also after a check that was given up."""

    site: Site
    config: Config | None = None
    insecure: bool = False
    undo: ExitStack = field(default_factory=ExitStack)

    @property
    def joined(self) -> bool:
        """Whether the nodes are those of a cluster; else there is only this machine."""
        return all(node is not None for node in self.site.nodes.values())

    @property
    def storage(self) -> str:
        """Where a run of the config writes on the nodes; of an object store, its local copy."""
        assert self.config is not None
        return str(run_path(self.config).parent)


Run = Callable[[Subject], Iterable[Row]]
NEEDS = {
    "": "",
    "config": " Only with CONFIG.",
    "nodes": " Only with several nodes.",
    "cluster and config": " Only with CONFIG, on a cluster.",
}
"""What a check is left out without."""


@dataclass(frozen=True)
class Check:
    """
    Attributes:
        looks_at: for the documentation.
        needs: a key of `NEEDS`.
        limit_s: after which the check is given up.
    """

    run: Run
    looks_at: str
    findings: tuple[Finding, ...]
    needs: str = ""
    limit_s: float = 2 * ASK_S


def _split(answers: Answers) -> tuple[dict[str, Any], list[Row]]:
    """Answers, and a row for each node without one."""
    good = {node: each for node, each in answers.items() if not isinstance(each, Exception)}
    lost = [NO_ANSWER.on(n, reason=first_line(e)) for n, e in answers.items() if n not in good]
    return good, lost


def _reason(error: RaytuneFtError) -> str:
    """Without the remedy; that of the finding stands beside it."""
    return f"{error.value} {error.rule}" if isinstance(error, InputError) else str(error)


def _judged(answers: Answers, judge: Callable[[dict[str, Any]], Iterable[Row]]) -> list[Row]:
    good, lost = _split(answers)
    return [*(judge(good) if good else ()), *lost]


NO_PROCESS = Finding(
    "defect",
    "starts no process: {reason}",
    "read the logs of Ray on that node (raylet.out, worker-*.err); Ray and Python must be the same "
    "as on the head; else remove the node",
)


def nodes(subject: Subject) -> Iterator[Row]:
    for node, error in subject.site.lost.items():
        yield NO_PROCESS.on(node, reason=first_line(error))
    count = len(subject.site.nodes)
    yield well(f"{count} node{'s' * (count != 1)} answer{'s' * (count == 1)}", _every(subject))


def _every(subject: Subject) -> str:
    return ALL if len(subject.site.nodes) > 1 else _first(subject)


DIFFERENT = Finding(
    "defect",
    "{package} is {own}; on the other nodes it is {others}",
    "install the same on every node: `pip install -c constraints.txt .`, or one image",
)
OUT_OF_BOUNDS = Finding(
    "defect",
    "{package} {own} is not {bounds}, for which raytune-ft is written",
    "`pip install -c constraints.txt .` on that node",
)


def versions(subject: Subject) -> list[Row]:
    try:
        needed = [Requirement(each) for each in requires("raytune-ft") or ()]
    except PackageNotFoundError:
        needed = []
    answers = subject.site.ask(probes.versions, (), ASK_S)
    return _judged(answers, lambda facts: judge_versions(facts, needed))


def judge_versions(facts: Answers, needed: Iterable[Requirement]) -> list[Row]:
    """Of two nodes that differ, the first one counts as right."""
    rows = []
    usual = {
        package: Counter(own[package] for own in facts.values()).most_common(1)[0][0]
        for package in next(iter(facts.values()))
    }
    for node, own in facts.items():
        for package, others in usual.items():
            if own[package] != others:
                rows.append(DIFFERENT.on(node, package=package, own=own[package], others=others))
        for each in needed:
            found = own.get(each.name.lower())
            if found is None or (each.marker is not None and not each.marker.evaluate()):
                continue
            if found == "absent" or not each.specifier.contains(found, prereleases=True):
                bounds = str(each.specifier)
                rows.append(OUT_OF_BOUNDS.on(node, package=each.name, own=found, bounds=bounds))
    shown = ", ".join(f"{package} {version}" for package, version in usual.items())
    return rows or [well(shown)]


TOO_MANY = Finding(
    "defect",
    "Ray offers {known} GPUs; the node has {real}",
    "start Ray there with --num-gpus={real}, or mend the driver (`nvidia-smi`)",
)
TOO_FEW = Finding(
    "warning",
    "Ray offers {known} GPUs; the node has {real}",
    "if all are meant to be used, start Ray there without CUDA_VISIBLE_DEVICES and with "
    "--num-gpus={real}",
)
UNUSABLE = Finding(
    "defect",
    "torch can use {usable} of {real} GPUs",
    "install a build of torch for CUDA, and a driver that is new enough for it",
)
DRIVERS = Finding(
    "warning",
    "the NVIDIA driver is {own}; on the other nodes it is {others}",
    "install the same driver on every node",
)


def gpus(subject: Subject) -> list[Row]:
    known = {
        name: node.resources.get("GPU", 0.0) if node is not None else None
        for name, node in subject.site.nodes.items()
    }
    arguments = {name: (bool(count),) for name, count in known.items()}
    answers = subject.site.ask(probes.gpus, arguments, IMPORT_S)
    return _judged(answers, lambda facts: judge_gpus(facts, known))


def judge_gpus(facts: Answers, known: Mapping[str, float | None]) -> list[Row]:
    """`known`: what Ray offers, None without Ray."""
    rows = []
    drivers = {node: own["listed"][0][1] for node, own in facts.items() if own["listed"]}
    usual = Counter(drivers.values()).most_common(1)[0][0] if drivers else ""
    for node, own in facts.items():
        usable = own["usable"] or 0
        real = usable if own["listed"] is None else len(own["listed"])
        offered = known[node]
        if offered is not None and offered != real:
            finding = TOO_MANY if offered > real else TOO_FEW
            rows.append(finding.on(node, known=f"{offered:g}", real=real))
        if usable < real:
            rows.append(UNUSABLE.on(node, usable=usable, real=real))
        if drivers.get(node, usual) != usual:
            rows.append(DRIVERS.on(node, own=drivers[node], others=usual))
    found = Counter(name for own in facts.values() for name, _ in own["listed"] or ())
    names = ", ".join(f"{count} x {name}" for name, count in found.items())
    return rows or [well(f"{names}, driver {usual}" if names else "no GPUs")]


TAKEN_TWICE = Finding(
    "defect",
    "{count} Ray clusters run on this host ({addresses}) and together offer {offered} {resource} "
    "of {real}",
    "end the one that is not meant (`ray stop` ends all), or give each a part with --num-cpus and "
    "--num-gpus",
)
SEVERAL = Finding(
    "warning",
    "{count} Ray clusters run on this host: {addresses}",
    "write the address of one into --address and RAY_ADDRESS, since `auto` may find the other",
)


def rays(subject: Subject) -> list[Row]:
    return _judged(subject.site.ask(probes.rays, (), ASK_S), judge_rays)


def judge_rays(facts: Answers) -> list[Row]:
    rows = []
    for node, own in facts.items():
        clusters = own["clusters"]
        if len(clusters) < 2:
            continue
        shown = {"count": len(clusters), "addresses": ", ".join(clusters)}
        offered = {name: sum(each[name] for each in clusters.values()) for name in own["has"]}
        twice = [name for name, amount in offered.items() if amount > own["has"][name]]
        rows += [
            TAKEN_TWICE.on(
                node,
                **shown,
                offered=f"{offered[name]:g}",
                resource=f"{name}s",
                real=f"{own['has'][name]:g}",
            )
            for name in twice
        ]
        rows += [SEVERAL.on(node, **shown)] * (not twice)
    return rows or [well("no host with two Ray clusters")]


CLOCK_WARNING_S, CLOCK_DEFECT_S = 1.0, 30.0
PINGS = 5
_SKEW = "the clock is {skew} {direction} that of the first node"
_SYNCHRONISE = "start a time service there (chrony, systemd-timesyncd)"
SKEWED = Finding("warning", _SKEW, _SYNCHRONISE)
FAR_SKEWED = Finding(
    "defect", _SKEW, f"{_SYNCHRONISE}; tokens, certificates and S3 requests are refused otherwise"
)


def clocks(subject: Subject) -> list[Row]:
    best: dict[str, Any] = {}
    for name in subject.site.nodes:
        for _ in range(PINGS):
            started = probes.now({})
            answer = subject.site.ask(probes.now, {name: ()}, ASK_S)[name]
            if isinstance(answer, Exception):
                best[name] = answer
                break
            ended = probes.now({})
            trip = ended - started
            if name not in best or trip < best[name][1]:
                best[name] = (answer - (started + ended) / 2, trip)
    return _judged(best, judge_clocks)


def judge_clocks(facts: Mapping[str, tuple[float, float]]) -> list[Row]:
    """Seconds by which each clock is ahead, and how long the question and its answer took; by half
    of that the first may be wrong, in favour of the node.
    """
    rows = []
    for node, (ahead, trip) in facts.items():
        skew = max(0.0, abs(ahead) - trip / 2)
        if skew > CLOCK_WARNING_S:
            finding = FAR_SKEWED if skew > CLOCK_DEFECT_S else SKEWED
            direction = "ahead of" if ahead > 0 else "behind"
            rows.append(finding.on(node, skew=seconds(skew), direction=direction))
    largest = max(abs(ahead) for ahead, _ in facts.values())
    return rows or [well(f"within {seconds(largest)} of the first node")]


DISK_WARNING, DISK_DEFECT = 10 * GIB, GIB
_LITTLE = "{free} free for {what} ({path})"
LITTLE_DISK = Finding("warning", _LITTLE, "free some, or write another path: see docs/doctor.md")
NO_DISK = Finding("defect", _LITTLE, "free some, or write another path: see docs/doctor.md")


def disk(subject: Subject) -> list[Row]:
    storage = subject.storage if subject.config else None
    return _judged(subject.site.ask(probes.disk, (storage,), ASK_S), judge_disk)


def judge_disk(facts: Answers) -> list[Row]:
    rows = []
    least: dict[str, int] = {}
    for node, own in facts.items():
        for what, (path, free) in own.items():
            least[what] = min(free, least.get(what, free))
            if free < DISK_WARNING:
                finding = NO_DISK if free < DISK_DEFECT else LITTLE_DISK
                rows.append(finding.on(node, free=size(free), what=what, path=path))
    return rows or [well(", ".join(f"{what} {size(free)} free" for what, free in least.items()))]


SHM = GIB
_SMALL = "/dev/shm has {bytes}"  # nosec B108 # no file is made there
_ENLARGE = "docker run --shm-size=8g; on Kubernetes mount an emptyDir of medium Memory there"
SMALL_SHM = Finding("warning", _SMALL, f"{_ENLARGE}; Ray keeps its objects on the disk otherwise")
SMALL_SHM_GPUS = Finding("defect", f"{_SMALL}, and several GPUs share it", f"{_ENLARGE}")


def shm(subject: Subject) -> list[Row]:
    several = {
        name
        for name, node in subject.site.nodes.items()
        if node is not None and node.resources.get("GPU", 0.0) > 1
    }
    answers = subject.site.ask(probes.shared_memory, (), ASK_S)
    return _judged(answers, lambda facts: judge_shm(facts, several))


def judge_shm(facts: Mapping[str, int | None], several_gpus: Iterable[str]) -> list[Row]:
    rows = [
        (SMALL_SHM_GPUS if node in several_gpus else SMALL_SHM).on(node, bytes=size(total))
        for node, total in facts.items()
        if (total or 0) < SHM
    ]
    return rows or [well(f"at least {size(min(filter(None, facts.values())))}")]


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
    rows = [_bucket(url, _first(subject))] if url else []
    folder, text = _probe_folder(subject), secrets.token_hex(16)
    if isinstance(folder, OSError):
        reason = folder.strerror
        return [*rows, UNWRITABLE.on(_first(subject), folder=subject.storage, reason=reason)]
    names = {node: f"node-{number}" for number, node in enumerate(subject.site.nodes)}
    asked = {node: (str(folder), name, text) for node, name in names.items()}
    wrote = subject.site.ask(probes.write, asked, ASK_S)
    good = [name for node, name in names.items() if not isinstance(wrote[node], Exception)]
    unread = subject.site.ask(probes.unreadable, (str(folder), text, good), ASK_S)
    unread, lost = _split(unread)
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


def _first(subject: Subject) -> str:
    return next(iter(subject.site.nodes), ALL)


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
        return NO_BUCKET.on(node, reason=_reason(error))
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
        return [NO_ANSWER.on(_first(subject), reason=f"{subject.storage} cannot be written")]
    path = str(folder / "lock")
    holder = _first(subject)
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


BLOCKED = Finding(
    "defect",
    "cannot connect to {peers}: {reason}",
    "open all TCP ports between the nodes (firewall, security group, NetworkPolicy), both ways",
)


def ports(subject: Subject) -> list[Row]:
    addresses = {name: node.address for name, node in subject.site.nodes.items()}
    asked = {name: (address,) for name, address in addresses.items()}
    opened, lost = _split(subject.site.ask(probes.listen, asked, ASK_S))
    places = {name: (addresses[name], port) for name, port in opened.items()}
    peers = {
        name: ({peer: place for peer, place in places.items() if peer != name},)
        for name in opened
        if len(opened) > 1
    }
    answers = subject.site.ask(probes.unconnected, peers, ASK_S)
    return [*_judged(answers, judge_ports), *lost]


def judge_ports(facts: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """The peers that each node cannot connect to, with the reason."""
    rows = []
    for node, failed in facts.items():
        for reason in sorted(set(failed.values())):
            peers = ", ".join(peer for peer, why in failed.items() if why == reason)
            rows.append(BLOCKED.on(node, peers=peers, reason=reason))
    return rows or [well("every node connects to every other one")]


_OPEN = "the Ray cluster at {address} takes commands from everybody who reaches it, without a token"
OPEN = Finding(
    "defect",
    _OPEN,
    "start it with a token (docs/cluster.md), or add --insecure if only you reach it",
)
OPEN_INSECURE = Finding("warning", _OPEN, "accepted by --insecure")
READABLE_TOKEN = Finding(
    "warning",
    "other users of the host can read the token of Ray (mode {mode})",
    "chmod 600 ~/.ray/auth_token; Ray 2.60.0 writes it so, 2.60.1 does not",
)


def auth(subject: Subject) -> Iterator[Row]:
    modes, lost = _split(subject.site.ask(probes.token_mode, (), ASK_S))
    yield from judge_tokens(modes)
    yield from lost
    for address in subject.site.gcs_addresses():
        from raytune_ft.ray_backend.jobs import open_place
        from raytune_ft.ray_backend.nodes import is_open

        nodes = [node.address for node in subject.site.nodes.values() if node]
        beyond = open_place([address.rpartition(":")[0], *nodes]) is not None
        try:
            yield judge_auth(address, is_open(address), beyond, subject.insecure)
        except Unreachable as error:
            yield NO_ANSWER.on(ALL, reason=str(error))


def judge_auth(address: str, is_open: bool, beyond_loopback: bool, insecure: bool) -> Row:
    if not is_open:
        return well(f"the Ray cluster at {address} refuses strangers")
    if not beyond_loopback:
        return well(f"the Ray cluster at {address} needs no token, and listens on loopback only")
    return (OPEN_INSECURE if insecure else OPEN).on(ALL, address=address)


def judge_tokens(modes: Mapping[str, int | None]) -> list[Row]:
    return [
        READABLE_TOKEN.on(node, mode=f"{mode:o}")
        for node, mode in modes.items()
        if mode is not None and mode & 0o077
    ]


TOO_SMALL = Finding(
    "warning",
    "the config does not fit on the nodes that are there: {reason}",
    "write fewer or smaller workers, or labels that nodes have, or add nodes",
)


def capacity(subject: Subject) -> Iterator[Row]:
    from raytune_ft.ray_backend.capacity import staying, wait_s
    from raytune_ft.ray_backend.cluster import require_capacity

    assert subject.config is not None
    parallel = subject.config.parallel
    try:
        groups = require_capacity(parallel, staying(parallel))
    except ClusterError as error:
        if limit_s := wait_s(parallel):
            yield well(f"a run waits up to {seconds(limit_s)} for nodes: {_reason(error)}")
        else:
            yield TOO_SMALL.on(ALL, reason=_reason(error))
    else:
        fit = "1 run or trial fits" if groups == 1 else f"{groups} runs or trials fit"
        yield well(f"{fit} at a time")


UNSET = Finding(
    "defect",
    "{names} {rule}",
    "export it there before `ray start`; on Kubernetes: in the pods of workers",
)
DIFFERENT_NETWORK = Finding(
    "warning",
    "settings of the network: {line}",
    "write the same everywhere, unless the nodes have different networks",
)


def environment(subject: Subject) -> list[Row]:
    assert subject.config is not None
    told: list[str] = []
    rows = []
    named = names_in(to_plain(subject.config))
    if absent := ", ".join(sorted(named - os.environ.keys())):
        rule = "is named by the config, and is not set"
        rows.append(UNSET.on(_first(subject), names=absent, rule=rule))
    if subject.joined:
        from raytune_ft.ray_backend.environment import NOT_SET, lacking

        if missing := lacking(subject.config, told.append):
            rows.append(UNSET.on(ALL, names=missing, rule=NOT_SET))
    rows += [DIFFERENT_NETWORK.on(ALL, line=line) for line in told]
    return rows or [well("every variable that workers need is set", _every(subject))]


SLOW, VERY_SLOW = 2.0, 5.0
SLOW_NETWORK = 0.1
"""GB/s; a network of 1 Gbit/s has 0.125."""
_SLOWER = "is slow: {own} GB/s with its best partner, {usual} GB/s is usual here"
_INSPECT = "look at its network card, cable and switch port (`ethtool`, `ip -s link`), and its load"
SLOW_NODE = Finding("warning", _SLOWER, _INSPECT)
VERY_SLOW_NODE = Finding("defect", _SLOWER, _INSPECT)
SLOW_PAIR = Finding(
    "warning",
    "is slow with {peer}: {own} GB/s, {usual} GB/s is usual here",
    "look at the path between the two, such as a switch or a zone",
)
SLOW_ALL = Finding(
    "warning",
    "the all-reduce has {own} GB/s, less than a network of 1 Gbit/s",
    "choose the faster network card with NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
)
NO_REDUCE = Finding(
    "defect",
    "the all-reduce by {backend} fails: {reason}",
    "open all TCP ports between the nodes; where a host name resolves to 127.0.0.1, export "
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME with the network card of the node's address before "
    "`ray start`",
)
GPUS_TAKEN = Finding(
    "unknown",
    "NCCL cannot be measured: {reason}; the figures are of gloo",
    "try again when a GPU of every node is free",
)


def all_reduce(subject: Subject) -> list[Row]:
    site, rows = subject.site, []
    if all(node.resources.get("GPU", 0.0) >= 1 for node in site.nodes.values()):
        from raytune_ft.ray_backend.nodes import NodeProcesses

        on_gpus = NodeProcesses(probes, gpus=1)
        subject.undo.callback(on_gpus.end)
        if not on_gpus.lost:
            return _reduced(on_gpus, "nccl")
        reason = first_line(next(iter(on_gpus.lost.values())))
        rows = [GPUS_TAKEN.on(", ".join(on_gpus.lost), reason=reason)]
    return [*_reduced(site, "gloo"), *rows]


def _reduced(site: Site, backend: str) -> list[Row]:
    names = list(site.nodes)
    _, lost = _split(site.ask(probes.load_torch, (), IMPORT_S))
    if lost:
        return lost
    address = site.nodes[names[0]].address
    port = site.ask(probes.meet, {names[0]: (address,)}, ASK_S)[names[0]]
    if isinstance(port, Exception):
        return [NO_ANSWER.on(names[0], reason=first_line(port))]
    asked = {name: (rank, len(names), (address, port), backend) for rank, name in enumerate(names)}
    answers = site.ask(probes.all_reduce, asked, 3 * probes.GROUP_S)
    return judge_all_reduce(answers, backend)


def judge_all_reduce(answers: Answers, backend: str) -> list[Row]:
    """The nodes in the order of their ranks; see `probes.all_reduce`."""
    failed = {node: each for node, each in answers.items() if isinstance(each, Exception)}
    if failed:
        return [
            NO_REDUCE.on(node, backend=backend, reason=first_line(e)) for node, e in failed.items()
        ]
    names = list(answers)
    first = answers[names[0]]
    # What each node sends, and receives, in an optimal all-reduce.
    share = 2 * (len(names) - 1) / len(names)
    speed = share * first["bytes"] / 1e9 / first["seconds"]
    pairs = {
        (node, names[peer]): min(own, answers[names[peer]]["pairs"][rank])
        for rank, node in enumerate(names)
        for peer, own in answers[node]["pairs"].items()
        if rank < peer
    }
    best = {node: max(own for pair, own in pairs.items() if node in pair) for node in names}
    usual = median(best.values())
    slowest = min(pairs, key=lambda pair: pairs[pair])
    rows = [
        well(
            f"{backend}: {_speed(speed)} GB/s a node with messages of {size(first['bytes'])}; "
            f"slowest pair: {slowest[0]} and {slowest[1]}, {_speed(pairs[slowest])} GB/s"
        )
    ]
    slow = {node for node in names if best[node] < usual / SLOW}
    for node in sorted(slow, key=lambda each: best[each]):
        finding = VERY_SLOW_NODE if best[node] < usual / VERY_SLOW else SLOW_NODE
        rows.append(finding.on(node, own=_speed(best[node]), usual=_speed(usual)))
    others = {pair: own for pair, own in pairs.items() if not slow.intersection(pair)}
    for pair, own in others.items():
        if own < median(others.values()) / VERY_SLOW:
            rows.append(SLOW_PAIR.on(pair[0], peer=pair[1], own=_speed(own), usual=_speed(usual)))
    if speed < SLOW_NETWORK:
        rows.append(SLOW_ALL.on(ALL, own=_speed(speed)))
    return rows


def _speed(value: float) -> str:
    return f"{value:.3g}"


CHECKS: dict[str, Check] = {
    "nodes": Check(nodes, "Whether Ray starts a process on every node", (NO_PROCESS,)),
    "versions": Check(
        versions,
        "Python, Ray, torch, its CUDA, transformers, peft, deepspeed, optuna and raytune-ft: equal "
        "on every node, and within the bounds of raytune-ft",
        (DIFFERENT, OUT_OF_BOUNDS),
    ),
    "gpus": Check(
        gpus,
        "The GPUs that Ray offers, that nvidia-smi lists and that torch can use; drivers",
        (TOO_MANY, TOO_FEW, UNUSABLE, DRIVERS),
        limit_s=IMPORT_S + ASK_S,
    ),
    "ray": Check(rays, "More than one Ray on a host", (TAKEN_TWICE, SEVERAL)),
    "auth": Check(
        auth,
        "Whether a stranger without a token may use the cluster; who may read the token",
        (OPEN, OPEN_INSECURE, READABLE_TOKEN),
    ),
    "clocks": Check(
        clocks,
        f"The clock of each node against that of the first, without the time of the question: a "
        f"warning above {CLOCK_WARNING_S:g} s, a defect above {CLOCK_DEFECT_S:g} s",
        (SKEWED, FAR_SKEWED),
        needs="nodes",
        limit_s=4 * ASK_S,
    ),
    "disk": Check(
        disk,
        f"Free space for temporary files, the cache of models and storage: a warning below "
        f"{size(DISK_WARNING)}, a defect below {size(DISK_DEFECT)}",
        (LITTLE_DISK, NO_DISK),
    ),
    "shm": Check(shm, f"Whether /dev/shm has {size(SHM)}", (SMALL_SHM, SMALL_SHM_GPUS)),
    "storage": Check(
        storage,
        "Each node writes a file into `storage` and reads those of all others; of s3:// also an "
        "object, by the first node",
        (UNWRITABLE, UNSHARED, NO_BUCKET),
        needs="config",
        limit_s=4 * ASK_S,
    ),
    "locks": Check(
        locks,
        "Whether a lock in `storage` that the first node holds keeps out all others",
        (NO_LOCKS, LOCK_TAKEN),
        needs="config",
        limit_s=3 * ASK_S,
    ),
    "capacity": Check(
        capacity,
        "Whether the nodes hold a run of the config",
        (TOO_SMALL,),
        needs="cluster and config",
    ),
    "environment": Check(
        environment,
        "The variables that workers of the config need, by name; see docs/cluster.md",
        (UNSET, DIFFERENT_NETWORK),
        needs="config",
        limit_s=4 * ASK_S,
    ),
    "ports": Check(
        ports,
        "Each node connects to a port that each other one has just opened",
        (BLOCKED,),
        needs="nodes",
        limit_s=3 * ASK_S,
    ),
    "all-reduce": Check(
        all_reduce,
        "An all-reduce over all nodes (NCCL if each has a GPU that is free, else gloo), and each "
        f"pair alone: a node is slow below 1/{SLOW:g} of the usual, a defect below "
        f"1/{VERY_SLOW:g}",
        (SLOW_NODE, VERY_SLOW_NODE, SLOW_PAIR, SLOW_ALL, NO_REDUCE, GPUS_TAKEN),
        needs="nodes",
        limit_s=IMPORT_S + 3 * probes.GROUP_S + 4 * ASK_S,
    ),
}
"""In the order of the table. The all-reduce comes last, since it may end its processes."""


def reference() -> str:
    """Markdown of every check with what it may find, for docs/doctor.md."""
    parts = []
    for name, check in CHECKS.items():
        needs = NEEDS[check.needs]
        lines = [f"### {name}\n", f"{check.looks_at}.{needs}\n"]
        lines += ["| status | found | remedy |", "|---|---|---|"]
        for finding in check.findings:
            lines.append(f"| {finding.status} | {' | '.join(finding.template)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
