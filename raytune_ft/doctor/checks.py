"""Every check of `doctor`.

A check is a function from a `Subject` to rows, and an entry of `CHECKS`. The judgement is a
function of its own, from plain answers to rows, so that it is tested without a cluster.
"""

from __future__ import annotations

from raytune_ft.doctor import cluster, machine, network, probes, storage
from raytune_ft.doctor.subject import ASK_S, IMPORT_S, NEEDS, Check
from raytune_ft.format import size

CHECKS: dict[str, Check] = {
    "nodes": Check(
        cluster.nodes, "Whether Ray starts a process on every node", (cluster.NO_PROCESS,)
    ),
    "versions": Check(
        machine.versions,
        "Python, Ray, torch, its CUDA, transformers, peft, deepspeed, optuna and raytune-ft: equal "
        "on every node, and within the bounds of raytune-ft",
        (machine.DIFFERENT, machine.OUT_OF_BOUNDS),
    ),
    "gpus": Check(
        machine.gpus,
        "The GPUs that Ray offers, that nvidia-smi lists and that torch can use; drivers",
        (machine.TOO_MANY, machine.TOO_FEW, machine.UNUSABLE, machine.DRIVERS),
        limit_s=IMPORT_S + ASK_S,
    ),
    "ray": Check(
        cluster.rays, "More than one Ray on a host", (cluster.TAKEN_TWICE, cluster.SEVERAL)
    ),
    "auth": Check(
        cluster.auth,
        "Whether a stranger without a token may use the cluster; who may read the token",
        (cluster.OPEN, cluster.OPEN_INSECURE, cluster.READABLE_TOKEN),
    ),
    "clocks": Check(
        machine.clocks,
        f"The clock of each node against that of the first, without the time of the question: a "
        f"warning above {machine.CLOCK_WARNING_S:g} s, a defect above {machine.CLOCK_DEFECT_S:g} s",
        (machine.SKEWED, machine.FAR_SKEWED),
        needs="nodes",
        limit_s=4 * ASK_S,
    ),
    "disk": Check(
        machine.disk,
        f"Free space for temporary files, the cache of models and storage: a warning below "
        f"{size(machine.DISK_WARNING)}, a defect below {size(machine.DISK_DEFECT)}",
        (machine.LITTLE_DISK, machine.NO_DISK),
    ),
    "shm": Check(
        machine.shm,
        f"Whether /dev/shm has {size(machine.SHM)}",
        (machine.SMALL_SHM, machine.SMALL_SHM_GPUS),
    ),
    "storage": Check(
        storage.storage,
        "Each node writes a file into `storage` and reads those of all others; of s3:// also an "
        "object, by the first node",
        (storage.UNWRITABLE, storage.UNSHARED, storage.NO_BUCKET),
        needs="config",
        limit_s=4 * ASK_S,
    ),
    "locks": Check(
        storage.locks,
        "Whether a lock in `storage` that the first node holds keeps out all others",
        (storage.NO_LOCKS, storage.LOCK_TAKEN),
        needs="config",
        limit_s=3 * ASK_S,
    ),
    "capacity": Check(
        cluster.capacity,
        "Whether the nodes hold a run of the config",
        (cluster.TOO_SMALL,),
        needs="cluster and config",
    ),
    "environment": Check(
        cluster.environment,
        "The variables that workers of the config need, by name; see docs/cluster.md",
        (cluster.UNSET, cluster.DIFFERENT_NETWORK),
        needs="config",
        limit_s=4 * ASK_S,
    ),
    "ports": Check(
        network.ports,
        "Each node connects to a port that each other one has just opened",
        (network.BLOCKED,),
        needs="nodes",
        limit_s=3 * ASK_S,
    ),
    "all-reduce": Check(
        network.all_reduce,
        "An all-reduce over all nodes (NCCL if each has a GPU that is free, else gloo), and each "
        f"pair alone: a node is slow below 1/{network.SLOW:g} of the usual, a defect below "
        f"1/{network.VERY_SLOW:g}",
        (
            network.SLOW_NODE,
            network.VERY_SLOW_NODE,
            network.SLOW_PAIR,
            network.SLOW_ALL,
            network.NO_REDUCE,
            network.GPUS_TAKEN,
        ),
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
