"""Which variables workers need; tests/nodes/ asks real nodes for them."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.config.load import apply_overrides
from raytune_ft.ray_backend.environment import needed
from tests.unit.config.test_identity import CONFIG

SET = {
    "HF_TOKEN": "hf_x",
    "WANDB_API_KEY": "x",
    "MLFLOW_TRACKING_TOKEN": "x",
    "NCCL_DEBUG": "INFO",
    "GLOO_SOCKET_IFNAME": "eth0",
    "HOME": "/root",
    "JUDGE_KEY": "x",
}
JUDGE = {"name": "judge", "url": "http://h", "model": "m", "api_key": "${JUDGE_KEY}"}


@pytest.mark.parametrize(
    ("changes", "several", "names"),
    [
        ({}, False, []),
        ({}, True, ["GLOO_SOCKET_IFNAME", "NCCL_DEBUG"]),
        ({"model.path": "org/name"}, False, ["HF_TOKEN"]),
        ({"tracking.to": ["wandb"]}, False, ["WANDB_API_KEY"]),
        ({"tracking.to": ["mlflow", "tensorboard"]}, False, ["MLFLOW_TRACKING_TOKEN"]),
        ({"tracking.uri": "http://me:${PASSWORD}@host"}, False, []),  # its value travels
        ({"rewards": [JUDGE]}, False, []),  # of `sample` alone
        ({"rewards": [JUDGE], "promote.metrics": ["reward:judge"]}, False, ["JUDGE_KEY"]),
        (
            {"rewards": [{**JUDGE, "mode": "pairs"}], "promote.metrics": ["win_rate:judge"]},
            False,
            [],
        ),  # the driver asks it
        (
            {"rewards": [{**JUDGE, "mode": "pairs"}], "train.watch": ["judge"]},
            False,
            ["JUDGE_KEY"],
        ),  # a worker asks it
    ],
)
def test_what_is_used_is_needed(changes: dict[str, Any], several: bool, names: list[str]) -> None:
    assert needed(apply_overrides(CONFIG, changes), SET, several) == names


def test_what_is_not_set_here_is_not_asked_for() -> None:
    config = apply_overrides(CONFIG, {"model.path": "org/name", "tracking.to": ["wandb"]})
    assert needed(config, {}, several=True) == []
