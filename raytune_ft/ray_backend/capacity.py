"""The room of a cluster that grows: announced to its autoscaler, waited for, looked at again."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import ray
from ray._private import ray_constants
from ray.autoscaler._private.util import format_readonly_node_type
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import (
    ResourceRequestPriority,
)
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get

from raytune_ft.background import repeated
from raytune_ft.config.schema import ParallelConfig
from raytune_ft.config.search_space import duration_s
from raytune_ft.errors import ClusterError
from raytune_ft.format import seconds
from raytune_ft.ray_backend.cluster import Nodes, require_capacity
from raytune_ft.ray_backend.placement import TYPE, for_ray, staying_nodes, suitable_nodes
from raytune_ft.records import Tell

AUTOSCALED_WAIT_S = 900.0
"""`parallel.wait_for_nodes` where an autoscaler runs."""
LOOK_S = 1.0
RENEW_S = 15.0
EXPIRE_S = 60.0
"""When a demand ends that its driver, which was killed, no longer renews."""
PATIENCE_S, PAUSE_S = 10.0, 60.0
"""See `Steps`. The autoscaler looks every 5 s."""


def autoscaler_runs() -> bool:
    """Whether nodes are added to the cluster on demand.

    `ray start` runs the first version of the autoscaler too, which only watches then and has a node
    type for every node. `ray up` and KubeRay run the second one.
    """
    if is_autoscaler_v2(fetch_from_server=True):
        return True
    status = _internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    report = json.loads(status).get("autoscaler_report") if status else None
    types = (report or {}).get("active_nodes", {})
    return any(not name.startswith(format_readonly_node_type("")) for name in types)


class Demand:
    """The worker groups that this driver has and wants: other runs leave them their room, and an
    autoscaler has nodes for them.

    It goes through the actor of Ray Train and Ray Data that adds up the demands of all drivers of a
    cluster: `ray.autoscaler.sdk.request_resources`, which that actor calls, knows only the last
    caller. A demand that is not renewed expires.
    """

    def __init__(
        self, parallel: ParallelConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        need = {name: amount for name, amount in parallel.resources.items() if amount}
        if parallel.accelerator is not None:
            need[TYPE + parallel.accelerator] = 0.001  # as Ray marks it
        self._group = [need] * parallel.max_workers
        self._labels = for_ray(parallel.label_selector) or {}
        self._name, self._clock = f"raytune-ft-{uuid.uuid4().hex[:8]}", clock
        self._asked, self._at = 0, -float("inf")

    def ask(self, groups: int) -> None:
        """Ask for this many worker groups, including those that run. Call it repeatedly."""
        now = self._clock()
        if groups == self._asked and (not groups or now - self._at < RENEW_S):
            return
        if groups == 0:
            self.withdraw()
            return
        bundles = [dict(need) for _ in range(groups) for need in self._group]
        self._actor().request_resources.remote(
            self._name,
            bundles,
            EXPIRE_S,
            priority=ResourceRequestPriority.HIGH,  # as Ray Train's own
            label_selectors=[self._labels] * len(bundles),
        )
        self._asked, self._at = groups, now

    def withdraw(self) -> None:
        """Ask for nothing; the autoscaler then ends idle nodes."""
        if self._asked:
            self._asked = 0
            with suppress(RayError):
                ray.get(self._actor().cancel_request.remote(self._name), timeout=10)

    def _actor(self) -> Any:
        return default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()


class Steps:
    """How many groups more than there are to ask for, of those that are lacking.

    The autoscaler ignores a demand above its largest number of nodes, without a word, and meanwhile
    those of other drivers too. So a demand that brings no node is halved, down to none for a while;
    nodes that come bring back all of it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._fit, self._step, self._since = -1, 0, 0.0

    def next(self, lacking: int, fit: int) -> int:
        """`fit` groups have room now."""
        now = self._clock()
        if fit > self._fit:
            self._step, self._since = lacking, now
        elif now - self._since > (PATIENCE_S if self._step else PAUSE_S):
            self._step, self._since = (self._step // 2 if self._step else 1), now
        self._fit = fit
        return min(self._step, lacking)


def wait_s(parallel: ParallelConfig) -> float:
    """How long nodes are waited for."""
    written = parallel.wait_for_nodes
    if written == "auto":
        return AUTOSCALED_WAIT_S if autoscaler_runs() else 0.0
    return duration_s(written) if isinstance(written, str) else written


def staying(parallel: ParallelConfig) -> Nodes:
    """The resources of the suitable nodes that are not drained; raises as `suitable_nodes` does."""
    return [node.resources for node in suitable_nodes(parallel, staying_nodes())]


@contextmanager
def awaited(parallel: ParallelConfig, tell: Tell) -> Iterator[tuple[int, Demand]]:
    """How many groups fit, once one does, and a demand that ends with the context.

    Raises:
        ClusterError: see `await_capacity`.
    """
    demand = Demand(parallel)
    try:
        yield await_capacity(parallel, tell, demand), demand
    finally:
        demand.withdraw()


@contextmanager
def room(parallel: ParallelConfig, tell: Tell, most: int) -> Iterator[int]:
    """How many groups fit, once one does. Inside, there is a demand for up to `most` of them;
    elastic groups make their own.

    Raises:
        ClusterError: see `await_capacity`.
    """
    with awaited(parallel, tell) as (fit, demand):
        kept = 0 if parallel.elastic else min(most, fit)
        with looking(partial(demand.ask, kept), RENEW_S):
            yield fit


def await_capacity(
    parallel: ParallelConfig,
    tell: Tell,
    demand: Demand,
    nodes: Callable[[ParallelConfig], Nodes] = staying,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """`require_capacity`, once it is met: one group is demanded and waited for.

    Raises:
        ClusterError: the nodes have not come within `parallel.wait_for_nodes`.
    """
    limit_s = wait_s(parallel)
    deadline = time.monotonic() + limit_s
    told = False
    while True:
        try:
            return require_capacity(parallel, nodes(parallel))
        except ClusterError as error:
            if time.monotonic() >= deadline:
                raise _never_came(error, limit_s) from None
            if not told:
                tell(f"waiting up to {seconds(limit_s)} for nodes: {error.value} {error.rule}")
                told = True
        if autoscaler_runs():
            demand.ask(1)
        sleep(LOOK_S)


@contextmanager
def looking(look: Callable[[], None], every_s: float = LOOK_S) -> Iterator[None]:
    """Call `look` again and again in a thread, until the context ends; once before it begins.

    A call that failed because a node or an actor was just lost is made again, also where it was the
    last node that suits.
    """
    look()

    def again() -> None:
        with suppress(RayError, ClusterError):
            look()

    with repeated(again, every_s, "capacity", join_s=10):
        yield


def _never_came(error: ClusterError, waited_s: float) -> ClusterError:
    if not waited_s:
        return error
    rule = f"{error.rule}, after {seconds(waited_s)} of waiting"
    return ClusterError(
        error.value, rule, f"{error.remedy}, or write a longer parallel.wait_for_nodes"
    )
