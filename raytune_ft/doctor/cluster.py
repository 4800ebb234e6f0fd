"""Checks of Ray: its processes, who may use it, and whether it can hold a run of the config."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from raytune_ft.config.environment import names_in
from raytune_ft.config.load import to_plain
from raytune_ft.doctor import probes
from raytune_ft.doctor.findings import ALL, NO_ANSWER, Finding, Row, well
from raytune_ft.doctor.subject import (
    ASK_S,
    Answers,
    Subject,
    answered,
    every_node,
    first_node,
    judged,
    without_remedy,
)
from raytune_ft.errors import ClusterError, Unreachable, first_line
from raytune_ft.format import seconds

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
    yield well(f"{count} node{'s' * (count != 1)} answer{'s' * (count == 1)}", every_node(subject))


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
    return judged(subject.site.ask(probes.rays, (), ASK_S), judge_rays)


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
    modes, lost = answered(subject.site.ask(probes.token_mode, (), ASK_S))
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
            yield well(f"a run waits up to {seconds(limit_s)} for nodes: {without_remedy(error)}")
        else:
            yield TOO_SMALL.on(ALL, reason=without_remedy(error))
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
        rows.append(UNSET.on(first_node(subject), names=absent, rule=rule))
    if subject.joined:
        from raytune_ft.ray_backend.environment import NOT_SET, lacking

        if missing := lacking(subject.config, told.append):
            rows.append(UNSET.on(ALL, names=missing, rule=NOT_SET))
    rows += [DIFFERENT_NETWORK.on(ALL, line=line) for line in told]
    return rows or [well("every variable that workers need is set", every_node(subject))]
