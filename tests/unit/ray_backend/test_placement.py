"""Which nodes suit a run, without a cluster; tests/nodes/ asks Ray."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.errors import ClusterError
from raytune_ft.ray_backend.cluster import most_workers, require_capacity, whole_groups
from raytune_ft.ray_backend.placement import Node, actor_options, matches, suitable_nodes

NODES = [
    Node("a" * 8, "10.0.0.1", {"CPU": 8.0}, {"zone": "a"}),
    Node("b" * 8, "10.0.0.2", {"CPU": 8.0, "accelerator_type:H100": 1.0}, {"zone": "b"}),
    Node("c" * 8, "10.0.0.3", {"CPU": 8.0, "accelerator_type:H100": 1.0}, {"zone": "c"}),
    Node("d" * 8, "10.0.0.4", {"CPU": 8.0, "accelerator_type:L4": 1.0}, {"zone": "c"}),
]


def parallel(**values: Any) -> ParallelConfig:
    return ParallelConfig.model_validate(values)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, "abcd"),
        ({"accelerator": "H100"}, "bc"),
        ({"label_selector": {"zone": "c"}}, "cd"),
        ({"label_selector": {"zone": "!c"}}, "ab"),
        ({"label_selector": {"zone": "in(a, b)"}}, "ab"),
        ({"label_selector": {"zone": "!in(a,b)"}}, "cd"),
        ({"label_selector": {"zone": "c", "rack": "!1"}}, "cd"),
        ({"accelerator": "H100", "label_selector": {"zone": "c"}}, "c"),
    ],
)
def test_nodes_with_the_accelerator_and_the_labels(values: dict[str, Any], found: str) -> None:
    assert "".join(n.id[0] for n in suitable_nodes(parallel(**values), NODES)) == found


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"accelerator": "H200"}, ["parallel.accelerator=H200", "H100 (2), L4 (1)"]),
        (
            {"label_selector": {"zone": "x"}},
            ["parallel.label_selector={zone: x}", "zone=a (1), zone=b (1), zone=c (2)"],
        ),
        ({"label_selector": {"rack": "1"}}, ["{rack: '1'}", "no label rack"]),
        (
            {"accelerator": "L4", "label_selector": {"zone": "a"}},
            ["{zone: a}", "together with parallel.accelerator=L4"],
        ),
    ],
)
def test_what_no_node_has_is_one_line(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ClusterError) as caught:
        suitable_nodes(parallel(**values), NODES)
    for word in [*words, "add nodes"]:
        assert word in str(caught.value)


def test_a_label_that_a_node_lacks_is_not_any_value() -> None:
    assert not matches({}, {"zone": "a"})
    assert matches({}, {"zone": "!a"})


@pytest.mark.parametrize(
    ("placement", "workers", "groups", "most"),
    [
        ("PACK", 4, 2, 8),
        ("SPREAD", 4, 2, 8),
        ("STRICT_PACK", 4, 1, 5),
        ("STRICT_PACK", 2, 3, 5),
        ("STRICT_SPREAD", 3, 1, 3),
        ("STRICT_SPREAD", 2, 3, 3),
        ("STRICT_SPREAD", 4, 0, 3),
    ],
)
def test_strict_placements_hold_fewer_groups(
    placement: str, workers: int, groups: int, most: int
) -> None:
    nodes = [{"CPU": 5.0}, {"CPU": 2.0}, {"CPU": 1.0}]
    assert whole_groups(nodes, {"CPU": 1}, workers, placement) == groups
    assert most_workers(nodes, {"CPU": 1}, placement) == most


def test_a_strict_placement_that_does_not_fit_is_named() -> None:
    wanted = parallel(workers=3, placement="STRICT_PACK")
    with pytest.raises(ClusterError) as caught:
        require_capacity(wanted, [{"CPU": 2.0}, {"CPU": 2.0}])
    for word in ("under parallel.placement=STRICT_PACK", "at most 2 workers"):
        assert word in str(caught.value)


def test_an_actor_gets_the_place_of_a_worker() -> None:
    each = {"CPU": 2.0, "GPU": 1.0, "tape": 3.0}
    labels = {"zone": "in(b, c)"}
    wanted = parallel(resources_per_worker=each, accelerator="L4", label_selector=labels)
    assert actor_options(wanted) == {
        "num_cpus": 2.0,
        "num_gpus": 1.0,
        "resources": {"tape": 3.0},
        "accelerator_type": "L4",
        "label_selector": {"zone": "in(b,c)"},
    }
