"""How many groups of workers fit and run at a time, without a cluster."""

from __future__ import annotations

import pytest

from raytune_ft.config.search import SearchConfig
from raytune_ft.ray_backend.cluster import whole_groups
from raytune_ft.ray_backend.sweep import concurrency


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


@pytest.mark.parametrize(
    ("written", "trials", "fit", "used", "said"),
    [
        ("auto", 20, 3, 3, False),
        (2, 20, 3, 2, False),
        (8, 20, 3, 3, True),
        (8, 3, 4, 3, False),  # more would be of no use anyway
        ("auto", 2, 4, 2, False),
    ],
)
def test_a_concurrency_that_does_not_fit_is_lowered_aloud(
    written: str | int, trials: int, fit: int, used: int, said: bool
) -> None:
    search = SearchConfig.model_validate(
        {"trials": trials, "max_concurrent": written, "space": {"train.lr": {"uniform": [0, 1]}}}
    )
    assert concurrency(search, fit)[0] == used
    note = "search.max_concurrent=8 is lowered to 3: no more trials fit at a time"
    assert concurrency(search, fit)[1] == (note if said else None)
