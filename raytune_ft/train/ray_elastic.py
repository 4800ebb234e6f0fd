"""How many workers an elastic run starts with, and when it takes on more.

Ray's own policy answers from a view of the cluster that is up to 20 s old and counts what others
use as free, so that it asks for workers that cannot start, waits for them, and asks again. And it
grows a group by killing it, which loses the work since the last checkpoint.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ScalingPolicy,
)
from ray.train.v2.api.config import ScalingConfig

from raytune_ft.ray_backend.cluster import whole_groups
from raytune_ft.ray_backend.worker import ask_to_stop

WAIT_S = 600.0
"""For the least number of workers. Then the run ends: Ray tries no start again that was not begun.

It is more than the 180 s for which Ray keeps the places of a driver that was killed."""
LOOK_EVERY_S = 0.5
VIEW_TIMEOUT_S = 5.0


def scaling_policy(config: ScalingConfig) -> ScalingPolicy:
    """Fixed, or ours."""
    return Elastic(config) if config.elasticity_enabled else FixedScalingPolicy(config)


class Elastic(ElasticScalingPolicy):
    """As many workers as can start now; one less after each start that timed out.

    A group grows as it moves off a node that is drained: it is asked to save and to leave, which
    loses nothing, and starts again.
    """

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        self._asked: int | None = None
        self._lacking_since: float | None = None
        self._looked = 0.0

    def make_decision_for_non_running_worker_group(self) -> Any:
        """See `ScalingPolicy`.

        Raises:
            WorkerGroupStartupTimeoutError: too few for too long, which ends the run.
        """
        self._maybe_send_resource_request()
        possible = self._possible()
        if self._asked is not None:
            possible = min(possible, max(self.scaling_config.min_workers, self._asked - 1))
        if possible >= self.scaling_config.min_workers:
            self._asked, self._lacking_since = possible, None
            return self._get_resize_decision(possible)
        now = time.monotonic()
        self._asked = None
        if self._lacking_since is None:
            self._lacking_since = now
        if now - self._lacking_since > WAIT_S:
            raise WorkerGroupStartupTimeoutError(self.scaling_config.min_workers)
        time.sleep(LOOK_EVERY_S)  # the controller asks again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """See `ScalingPolicy`; never a resize, which would kill the workers."""
        self._maybe_send_resource_request()
        self._asked, now = None, time.monotonic()
        since = max(worker_group_state.start_time, self._looked)
        if now - since < self.scaling_config.elastic_resize_monitor_interval_s:
            return NoopDecision()
        self._looked = now
        size = worker_group_state.num_workers
        more = self.scaling_config.max_workers > size and self._fitting(_nodes(free=True)) > 0
        # While a node drains, a place that is free elsewhere is no more than the one that is lost.
        if more and self._possible() > size:
            for worker in worker_group_state.workers:
                worker.actor.execute.remote(ask_to_stop)
        return NoopDecision()

    def _possible(self) -> int:
        """By a fresh view of the cluster, less what is reserved for other runs of Ray Train."""
        try:
            reserved = ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(
                    self._requester_id, recompute=True
                ),
                timeout=VIEW_TIMEOUT_S,
            )
        except RayError:
            return 0  # asked again
        staying = _nodes()
        return self._fitting({node: its for node, its in reserved.items() if node in staying})

    def _fitting(self, nodes: dict[str, dict[str, float]]) -> int:
        need = self.scaling_config._resources_per_worker_not_none
        return min(whole_groups(list(nodes.values()), need, 1), self.scaling_config.max_workers)


def _nodes(free: bool = False) -> dict[str, dict[str, float]]:
    """Resources of the nodes that are alive and stay, in all or what nobody has reserved."""
    state = ray._private.state.state
    leaving = state.get_draining_nodes()
    totals = state.available_resources_per_node() if free else state.total_resources_per_node()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return {node: dict(r) for node, r in totals.items() if node in alive and node not in leaving}
