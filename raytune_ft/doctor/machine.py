"""Checks of what each node has: versions, GPUs, clock, disk, shared memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from packaging.requirements import Requirement

from raytune_ft.doctor import probes
from raytune_ft.doctor.findings import Finding, Row, well
from raytune_ft.doctor.subject import ASK_S, IMPORT_S, Answers, Subject, judged
from raytune_ft.format import GIB, seconds, size

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
    return judged(answers, lambda facts: judge_versions(facts, needed))


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
    return judged(answers, lambda facts: judge_gpus(facts, known))


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
    return judged(best, judge_clocks)


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
    return judged(subject.site.ask(probes.disk, (storage,), ASK_S), judge_disk)


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
    return judged(answers, lambda facts: judge_shm(facts, several))


def judge_shm(facts: Mapping[str, int | None], several_gpus: Iterable[str]) -> list[Row]:
    rows = [
        (SMALL_SHM_GPUS if node in several_gpus else SMALL_SHM).on(node, bytes=size(total))
        for node, total in facts.items()
        if (total or 0) < SHM
    ]
    return rows or [well(f"at least {size(min(filter(None, facts.values())))}")]
