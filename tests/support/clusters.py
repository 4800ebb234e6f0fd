"""A Ray cluster of nodes in processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.cluster_utils import Cluster

from raytune_ft.ray_backend.cluster import connect


@contextmanager
def joined_cluster(head: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[Cluster]:
    """One with this head, which this process has joined; its processes have these variables."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0", **environment}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    cluster = Cluster(initialize_head=True, head_node_args=dict(head))
    connect(cluster.address)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
