"""Checks of the network between nodes: ports, and the speed of an all-reduce."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from raytune_ft.doctor import probes
from raytune_ft.doctor.findings import ALL, NO_ANSWER, Finding, Row, well
from raytune_ft.doctor.subject import ASK_S, IMPORT_S, Answers, Site, Subject, answered, judged
from raytune_ft.errors import first_line
from raytune_ft.format import size

BLOCKED = Finding(
    "defect",
    "cannot connect to {peers}: {reason}",
    "open all TCP ports between the nodes (firewall, security group, NetworkPolicy), both ways",
)


def ports(subject: Subject) -> list[Row]:
    addresses = {name: node.address for name, node in subject.site.nodes.items()}
    asked = {name: (address,) for name, address in addresses.items()}
    opened, lost = answered(subject.site.ask(probes.listen, asked, ASK_S))
    places = {name: (addresses[name], port) for name, port in opened.items()}
    peers = {
        name: ({peer: place for peer, place in places.items() if peer != name},)
        for name in opened
        if len(opened) > 1
    }
    answers = subject.site.ask(probes.unconnected, peers, ASK_S)
    return [*judged(answers, judge_ports), *lost]


def judge_ports(facts: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """The peers that each node cannot connect to, with the reason."""
    rows = []
    for node, failed in facts.items():
        for reason in sorted(set(failed.values())):
            peers = ", ".join(peer for peer, why in failed.items() if why == reason)
            rows.append(BLOCKED.on(node, peers=peers, reason=reason))
    return rows or [well("every node connects to every other one")]


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
    _, lost = answered(site.ask(probes.load_torch, (), IMPORT_S))
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
