"""`parallel.strategy: auto` where memory decides."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from raytune_ft.app import placed
from raytune_ft.config.load import apply_overrides, choose_strategy, load_config, memory_decides
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config, ParallelConfig
from raytune_ft.errors import ConfigError
from raytune_ft.estimate import hardware
from raytune_ft.estimate.hardware import GIB, PROCESS, USABLE, Hardware, named
from raytune_ft.estimate.memory import MemoryModel, held_by, shortage, teaching_of
from raytune_ft.estimate.parameters import build_shell
from raytune_ft.model.load import build_frozen
from raytune_ft.ray_backend.memory import least_memory, packed
from raytune_ft.train.distill import teacher_model

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(ROOT)
    return load_config(ROOT / "jobs" / "quickstart.yaml", ["parallel.workers=2"])


def test_a_base_that_fits_is_copied_and_one_that_does_not_is_sharded(config: Config) -> None:
    assert shortage(config, None) is None
    assert shortage(config, GIB) is None
    reason = shortage(config, 2**20)
    assert reason is not None
    assert reason.startswith("a whole copy needs ")
    assert resolve(config).parallel.strategy == "ddp"
    small = resolve(config, shortage=reason)
    assert small.parallel.strategy == "fsdp"
    assert choose_strategy(config, reason) == (
        "fsdp",
        f"the base is frozen, and {reason}: 2 workers shard it",
    )
    assert choose_strategy(small)[0] == "fsdp"  # as every worker asks again


def test_where_sharding_does_not_help_the_base_is_copied(config: Config) -> None:
    # Room for the model of 4 MB and not for its activations, of which sharding takes nothing away.
    assert shortage(apply_overrides(config, {"data.max_length": 1024}), 6 * 2**20) is None


def test_a_teacher_takes_room_unless_its_logits_are_on_disk(config: Config) -> None:
    taught = apply_overrides(
        config, {"train.objective": "kd", "train.kd": {"teacher": "builtin:tiny"}}
    )
    teaching = teaching_of(taught)
    assert teaching is not None
    built = build_frozen(teacher_model(taught), taught.train.precision)
    assert teaching.held == sum(p.nbytes for p in built.parameters())
    shell = build_shell(config.model, config.method, config.train.precision)
    usable = held_by(shell, config.parallel).resident + teaching.held // 2
    assert shortage(taught, usable) is not None
    assert shortage(apply_overrides(taught, {"train.kd.cache": "disk"}), usable) is None


def test_a_copy_fits_where_the_table_says_so(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process takes its own before it holds a model, here and there."""
    copied = GIB

    def estimate(_: MemoryModel, parallel: ParallelConfig, *__: object) -> SimpleNamespace:
        return SimpleNamespace(peak={"ddp": copied, "fsdp": copied // 2}[parallel.strategy])

    monkeypatch.setattr(MemoryModel, "estimate", estimate)
    for usable in (copied + PROCESS["cpu"], copied + PROCESS["cpu"] - 1):
        worker = Hardware("X", "cpu", 1, 2, usable, usable, 1, 1, 1, 1, "a test")
        assert (shortage(config, usable) is None) == worker.fits(copied)


def test_replicas_are_sharded_however_much_fits(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.estimate.memory.shortage", lambda *_: pytest.fail("asked"))
    copies = apply_overrides(config, {"parallel.replicas": 2})
    with placed(copies, usable=2**50) as (chosen, reason):
        assert chosen.parallel.strategy == "fsdp"
        assert "parallel.replicas" in reason


@pytest.mark.parametrize(
    "change",
    [
        {"parallel.workers": 1},
        {"method.name": "full"},
        {"parallel.strategy": "ddp"},
        {"parallel.offload": "all"},
    ],
)
def test_memory_decides_nothing_else(config: Config, change: dict[str, object]) -> None:
    assert memory_decides(config)
    assert not memory_decides(apply_overrides(config, change))


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
    assert least_memory([known], {"CPU": 1.0, "GPU": 2.0}) == int(80 * GIB * USABLE)


def test_a_group_takes_as_few_nodes_as_it_can() -> None:
    large, small, each = {"CPU": 8.0}, {"CPU": 2.0}, {"CPU": 1.0}
    assert packed([small, large], each, 8) == (1, 8)
    assert packed([small, large], each, 10) == (2, 5)
    assert packed([large, large], {"CPU": 2.0}, 6) == (2, 3)
    assert packed([large, {"GPU": 1.0}], each, 32) == (4, 8)  # more than there is
    assert packed([], each, 4) == (1, 4)


def test_workers_may_share_an_accelerator() -> None:
    whole = named("H100", 1, 8, "bfloat16")
    half = whole.shared(0.5)
    assert (half.memory, half.tflops) == (40 * GIB, whole.tflops / 2)
    assert half.usable == pytest.approx(40 * GIB * USABLE, abs=1)
    assert whole.shared(2.0) == whole


def test_accelerators_are_known_by_name() -> None:
    found = named("h100", 2, 8, "bfloat16")
    assert (found.name, found.nodes, found.per_node) == ("H100", 2, 8)
    assert found.memory == 80 * GIB
    assert named("A10G", 1, 8, "bfloat16").memory == 22.5 * GIB  # without what ECC takes
    with pytest.raises(ConfigError, match=r"--accelerator=A100 is none .* A100-40G or A100-80G"):
        named("A100", 1, 8, "bfloat16")


def test_memory_of_this_machine_is_shared_by_its_workers() -> None:
    alone, shared = hardware.worker_memory(1, 0.0), hardware.worker_memory(4, 0.0)
    assert alone is not None
    assert shared is not None
    assert alone // 4 == pytest.approx(shared, abs=1)
