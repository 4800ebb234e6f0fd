"""How many workers an elastic run asks for; no cluster."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback_manager import CallbackManager
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    InitializingState,
    RestartingState,
    ShuttingDownState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, NoopDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from raytune_ft.ray_backend.worker_group import Elastic, StartsInARow, scaling_policy

LOST = WorkerGroupError("a worker died", {0: RuntimeError()})


class Policy(Elastic):
    """With a cluster that is told."""

    possible = 4

    def _maybe_send_resource_request(self) -> None:
        pass

    def _possible(self) -> int:
        return min(self.possible, self.scaling_config.max_workers)

    def start(self) -> int | None:
        decision = self.make_decision_for_non_running_worker_group()
        return None if isinstance(decision, NoopDecision) else decision.num_workers


@dataclass
class Clock:
    """Ten seconds pass with each sleep."""

    now: float = 0.0

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 10.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def nodes() -> dict[str, dict[str, float]]:
    """What is free on each node; a test may change it."""
    return {"node": {"CPU": 0.0}}


@pytest.fixture
def policy(clock: Clock, nodes: dict[str, dict[str, float]]) -> Policy:
    config = ScalingConfig(num_workers=(2, 4), elastic_resize_monitor_interval_s=0)
    return Policy(config, lambda free: nodes, clock.read, clock.sleep)


def running(policy: Policy, size: int) -> list[Any]:
    """Lets the policy look at a group; whom it asked to leave."""
    asked: list[Any] = []
    actor = SimpleNamespace(execute=SimpleNamespace(remote=asked.append))
    state = SimpleNamespace(
        start_time=0.0, num_workers=size, workers=[SimpleNamespace(actor=actor)] * size
    )
    assert isinstance(policy.make_decision_for_running_worker_group(state, None), NoopDecision)
    return asked


def test_a_start_that_timed_out_is_tried_with_one_less(policy: Policy) -> None:
    assert [policy.start() for _ in range(4)] == [4, 3, 2, 2]
    running(policy, 4)
    assert policy.start() == 4  # it did run: nothing was wrong with the number


def test_too_few_nodes_are_waited_for(policy: Policy) -> None:
    policy.possible = 1
    assert policy.start() is None
    policy.possible = 3
    assert policy.start() == 3


@pytest.mark.parametrize("state", [InitializingState(), RestartingState(LOST)])
def test_a_run_with_too_few_nodes_goes_on_waiting_and_then_fails(
    state: TrainControllerState, policy: Policy, clock: Clock
) -> None:
    controller = TrainController.__new__(TrainController)
    controller._state, controller._scaling_policy = state, policy
    controller._failure_policy = StartsInARow(FailureConfig(controller_failure_limit=10))
    controller._controller_callback_manager = CallbackManager([])
    controller._generate_run_attempt_id()
    policy.possible = 1
    while controller.get_state() is state and clock.now < 10_000:
        asyncio.run(controller._run_control_loop_iteration())
    assert 600 <= clock.now < 630
    ending = controller.get_state()
    assert isinstance(ending, ShuttingDownState)
    assert isinstance(ending.next_state, ErroredState)


def test_failed_starts_are_forgotten_once_a_group_has_run() -> None:
    policy = StartsInARow(FailureConfig(max_failures=1, controller_failure_limit=2))
    late = ControllerError(WorkerGroupStartupTimeoutError(2))
    retry, give_up = FailureDecision.RETRY, FailureDecision.RAISE
    errors = [late, late, LOST, late, late, late]
    decisions = [policy.make_decision(error) for error in errors]
    assert decisions == [retry] * 5 + [give_up]


def test_a_group_leaves_to_grow_only_where_a_worker_fits(
    policy: Policy, nodes: dict[str, dict[str, float]]
) -> None:
    assert running(policy, 3) == []
    nodes["node"]["CPU"] = 1.0
    assert len(running(policy, 3)) == 3
    assert running(policy, 4) == []
    policy.possible = 3  # the free place only makes up for one that is lost
    assert running(policy, 3) == []


def test_a_fixed_number_asks_no_autoscaler() -> None:
    """Its driver does, for all groups; nothing else of Ray's own policy is replaced."""
    policy = scaling_policy(ScalingConfig(num_workers=2))
    assert isinstance(policy, FixedScalingPolicy)
    own = {name for name in vars(type(policy)) if name.endswith(("start", "request"))}
    assert own == {"after_controller_start", "_maybe_send_resource_request"}
    policy._maybe_send_resource_request()
