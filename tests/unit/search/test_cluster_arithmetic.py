"""How many groups of workers fit, without a cluster."""

from __future__ import annotations

import pytest

from raytune_ft.train.ray_cluster import whole_groups


@pytest.mark.parametrize(
    ("nodes", "need", "workers", "groups"),
    [
        ([{"CPU": 2.0}], {"CPU": 1}, 2, 1),
        ([{"CPU": 2.0}], {"CPU": 1, "GPU": 0}, 1, 2),
        ([{"CPU": 2.0}], {"CPU": 1}, 3, 0),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2}, 1, 2),  # a worker is never split
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 1}, 4, 1),  # a group is, where it must
        ([{"CPU": 64.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 8.0}], {"CPU": 1, "GPU": 1}, 1, 3),
        ([{"CPU": 1.0}], {"CPU": 0.1}, 1, 10),
        ([], {"CPU": 1}, 1, 0),
    ],
)
def test_groups_are_counted_node_by_node(
    nodes: list[dict[str, float]], need: dict[str, float], workers: int, groups: int
) -> None:
    assert whole_groups(nodes, need, workers) == groups
