"""Where workers run, and what their nodes must have, on nodes with labels of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError, TaskUnschedulableError

from raytune_ft.config.load import apply_overrides
from raytune_ft.config.schema import ModelConfig, ParallelConfig
from raytune_ft.errors import ClusterError
from raytune_ft.ray_backend import fetch as fetch_module
from raytune_ft.ray_backend.environment import check_environment
from raytune_ft.ray_backend.fetch import fetch_on_nodes
from raytune_ft.ray_backend.placement import alive_nodes, for_ray, matches
from raytune_ft.ray_backend.run_handle import fit
from raytune_ft.rundir import RunSpec
from tests.nodes.conftest import Nodes, nodes_in_use
from tests.ray.conftest import Inputs
from tests.support.hub import COMMIT, MODEL, Hub, hub_server
from tests.support.runs import largest_difference

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hub(inputs: Inputs) -> Iterator[Hub]:
    """Serves the model of the inputs."""
    with hub_server(Path(inputs.config().model.path)) as server:
        yield server


@pytest.fixture(scope="module")
def places(
    nodes: Nodes, hub: Hub, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Ids of three nodes by zone: `b` and `c` have a token, `c` another network interface."""
    home = tmp_path_factory.mktemp("homes")
    more: dict[str, dict[str, Any]] = {
        "a": {"resources": {"accelerator_type:L4": 1}},
        "b": {"resources": {"accelerator_type:H100": 1}},
        "c": {"resources": {"accelerator_type:H100": 1}},
    }
    variables = {
        "a": {"NCCL_SOCKET_IFNAME": "eth0"},
        "b": {"NCCL_SOCKET_IFNAME": "eth0", "HF_TOKEN": "hf_secret"},
        "c": {"NCCL_SOCKET_IFNAME": "eth1", "HF_TOKEN": "hf_secret"},
    }
    added = {
        zone: nodes.cluster.add_node(
            num_cpus=2,
            labels={"zone": zone},
            env_vars=variables[zone] | hub.environment(home / zone),
            **options,
        )
        for zone, options in more.items()
    }
    nodes.cluster.wait_for_nodes()
    yield {zone: node.node_id for zone, node in added.items()}
    for node in added.values():
        nodes.cluster.remove_node(node)


@pytest.mark.parametrize("selected", ["b", "!b", "in(a, c)", "!in(a, c)"])
def test_labels_are_read_as_ray_reads_them(places: dict[str, str], selected: str) -> None:
    """Also on a node without the label, the head."""
    selector = {"zone": selected}
    for node in alive_nodes():
        wanted = (for_ray(selector) or {}) | {"ray.io/node-id": node.id}
        remote: Any = ray.remote(num_cpus=0)(lambda: True)
        asked = remote.options(label_selector=wanted).remote()
        try:
            placed = ray.get(asked, timeout=30 if matches(node.labels, selector) else 3)
        except (GetTimeoutError, TaskUnschedulableError):
            placed = False
            ray.cancel(asked)
        assert placed == matches(node.labels, selector), node


@pytest.mark.parametrize(
    ("parallel", "zones"),
    [
        ({"label_selector": {"zone": "c"}, "workers": 2}, "c"),
        ({"accelerator": "H100", "placement": "SPREAD", "workers": 2}, "bc"),
        ({"accelerator": "L4", "placement": "STRICT_PACK", "workers": [1, 2]}, "a"),
    ],
)
def test_workers_run_where_they_were_placed(
    places: dict[str, str], inputs: Inputs, tmp_path: Path, parallel: dict[str, Any], zones: str
) -> None:
    config = inputs.config(**{f"parallel__{key}": value for key, value in parallel.items()})
    used: list[set[str]] = []
    result = fit(RunSpec(config, tmp_path, inputs.data_dir), lambda *_: used.append(nodes_in_use()))
    assert result.status == "completed"
    assert used[0] == {places[zone] for zone in zones}


def test_what_no_node_has_is_refused_before_workers_start(
    places: dict[str, str], inputs: Inputs, tmp_path: Path
) -> None:
    for key, value, words in (
        ("label_selector", {"zone": "x"}, "zone=a (1), zone=b (1), zone=c (1)"),
        ("accelerator", "H200", "H100 (2), L4 (1)"),
    ):
        config = inputs.config(**{f"parallel__{key}": value})
        with pytest.raises(ClusterError) as caught:
            fit(RunSpec(config, tmp_path, inputs.data_dir))
        assert f"parallel.{key}=" in str(caught.value)
        assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_variables_that_a_node_lacks_are_named_and_no_value_is(
    places: dict[str, str], inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    config = inputs.config(parallel__workers=2, parallel__label_selector={"zone": "in(a, b, c)"})
    config = apply_overrides(config, {"model.path": MODEL})
    with pytest.raises(ClusterError) as caught:
        check_environment(config, print)
    line = str(caught.value)
    assert "HF_TOKEN on node" in line
    assert places["a"][:8] in line
    assert places["b"][:8] not in line
    assert "ray start" in line
    assert "hf_secret" not in line
    told: list[str] = []
    config = inputs.config(parallel__workers=2, parallel__accelerator="H100")
    check_environment(apply_overrides(config, {"model.path": MODEL}), told.append)
    assert len(told) == 1
    assert "NCCL_SOCKET_IFNAME differs" in told[0]
    assert places["c"][:8] in told[0]
    assert "eth" not in told[0]


def test_a_model_is_fetched_once_to_each_node(
    places: dict[str, str], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "commit_of", lambda model: COMMIT)  # of another hub here
    wanted = ParallelConfig(label_selector={"zone": "in(a, b)"})
    model = ModelConfig(path=MODEL)
    found = fetch_on_nodes(model, wanted, print)
    assert {node.id for node, _ in found} == {places["a"], places["b"]}
    assert len({fetched.folder for _, fetched in found}) == 2
    assert all(fetched.new for _, fetched in found)
    assert hub.downloads() == 2
    assert not any(fetched.new for _, fetched in fetch_on_nodes(model, wanted, print))
    assert hub.downloads() == 2


def test_workers_of_a_node_download_once(
    places: dict[str, str], hub: Hub, inputs: Inputs, tmp_path: Path, undisturbed: Path
) -> None:
    before = len(hub.requests)
    config = inputs.config(parallel__workers=2, parallel__label_selector={"zone": "c"})
    spec = RunSpec(apply_overrides(config, {"model.path": MODEL}), tmp_path, inputs.data_dir)
    assert fit(spec).status == "completed"
    asked = [each for each in hub.requests[before:] if each.endswith("/model.safetensors")]
    assert sum(each.startswith("GET") for each in asked) == 1
    assert max(largest_difference(tmp_path, undisturbed)) < 1e-5
