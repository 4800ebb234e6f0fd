"""Nodes and memory that workers would get, from descriptions of nodes."""

from __future__ import annotations

from raytune_ft.estimate.hardware import USABLE
from raytune_ft.format import GIB
from raytune_ft.ray_backend.cluster import least_memory, packed


def test_memory_of_a_cluster_is_that_of_its_smallest_fitting_node() -> None:
    known = {"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0, "memory": 8.0 * GIB}
    smaller = {**known, "accelerator_type:A100": 1.0}
    del smaller["accelerator_type:H100"]
    gpu = {"CPU": 1.0, "GPU": 1.0}
    assert least_memory([known], gpu) == int(80 * GIB * USABLE)
    assert least_memory([known, smaller], gpu) == int(40 * GIB * USABLE)
    assert least_memory([known, {"CPU": 8.0, "GPU": 1.0}], gpu) is None
    assert least_memory([known, {"CPU": 8.0, "memory": 1.0}], gpu) == int(80 * GIB * USABLE)
    assert least_memory([known], {"CPU": 2.0}) == 2 * GIB
    assert least_memory([], gpu) is None
    assert least_memory([known], {"CPU": 1.0, "GPU": 0.5}) == int(40 * GIB * USABLE)


def test_a_group_takes_as_few_nodes_as_it_can() -> None:
    large, small, each = {"CPU": 8.0}, {"CPU": 2.0}, {"CPU": 1.0}
    assert packed([small, large], each, 8) == (1, 8)
    assert packed([small, large], each, 10) == (2, 5)
    assert packed([large, large], {"CPU": 2.0}, 6) == (2, 3)
    assert packed([large, {"GPU": 1.0}], each, 32) == (4, 8)  # more than there is
    assert packed([], each, 4) == (1, 4)
